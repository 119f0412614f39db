//! A TCP proxy on loopback that can be made to fail: late, silent in one direction or both, cut, reset, in slices.
//!
//! One proxy stands before one listener. Connections are told apart by who dials, so that one link of one process can
//! be broken while all others work. What is held back is bounded and not lost: a TCP connection survives a gap, too.
//! Runs on its own thread and ends with its handle.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::PATIENCE;
use super::fault::{Door, Fault, Flow};
use super::pump::join;

const DIAL_MAX: Duration = Duration::from_secs(5);
const BACKLOG: u32 = 256;

/// What the connections of one dialler hear of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) fault: Fault,
    /// Counts how often everything that was open was reset.
    resets: u64,
}

/// Names who dials, by the address that a connection comes from and the one that it goes to. Any name will do.
pub type Origin = Arc<dyn Fn(SocketAddr, SocketAddr) -> String + Send + Sync>;

#[derive(Default)]
struct Lanes {
    /// Of whoever has none of his own yet.
    usual: State,
    by_origin: BTreeMap<String, watch::Sender<State>>,
}

impl Lanes {
    fn of(&mut self, origin: &str) -> &watch::Sender<State> {
        let usual = self.usual;
        self.by_origin.entry(origin.to_owned()).or_insert_with(|| watch::channel(usual).0)
    }
}

/// A running proxy.
pub struct Proxy {
    listen: SocketAddr,
    lanes: Arc<Mutex<Lanes>>,
    listening: watch::Sender<bool>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// # Panics
    /// The address cannot be had.
    pub fn start(listen: SocketAddr, target: SocketAddr, origin: Origin) -> Self {
        let lanes = Arc::<Mutex<Lanes>>::default();
        let (listening, wanted) = watch::channel(true);
        let (end, ended) = oneshot::channel();
        let (ready, bound) = std::sync::mpsc::channel();
        let shared = lanes.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = hold(listen).and_then(|socket| socket.listen(BACKLOG));
                let listener = listener.unwrap_or_else(|error| panic!("{listen}: {error}"));
                // A port 0 is another one by now.
                let listen = listener.local_addr().expect("it listens");
                _ = ready.send(listen);
                let serving = Serving { listen, target, origin, lanes: shared };
                tokio::select! {
                    () = serving.run(listener, wanted) => {}
                    _ = ended => {}
                }
            });
        });
        let listen = bound.recv().expect("the proxy listens");
        Self { listen, lanes, listening, end: Some(end), thread: Some(thread) }
    }

    /// Where it is to be dialled.
    pub fn addr(&self) -> SocketAddr {
        self.listen
    }

    /// From now on, for the connections of this dialler, those that are open included.
    pub fn set(&self, origin: &str, fault: Fault) {
        self.lanes().of(origin).send_modify(|state| state.fault = fault);
    }

    /// For those of everybody.
    pub fn set_all(&self, fault: Fault) {
        let mut lanes = self.lanes();
        lanes.usual.fault = fault;
        lanes.by_origin.values().for_each(|lane| lane.send_modify(|state| state.fault = fault));
    }

    /// Resets what this dialler has open, once.
    pub fn reset(&self, origin: &str) {
        self.lanes().of(origin).send_modify(|state| state.resets += 1);
    }

    /// Whether anybody listens at all: a port without a process refuses.
    pub fn listen(&self, wanted: bool) {
        self.listening.send_replace(wanted);
    }

    fn lanes(&self) -> std::sync::MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.end.take());
        // A thread that panicked has said so.
        _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Takes the port without listening: whoever dials it is refused.
fn hold(addr: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(socket)
}

struct Serving {
    listen: SocketAddr,
    target: SocketAddr,
    origin: Origin,
    lanes: Arc<Mutex<Lanes>>,
}

impl Serving {
    async fn run(&self, mut listener: TcpListener, mut wanted: watch::Receiver<bool>) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = self.accept(&listener, &mut connections) => {}
                _ = wanted.wait_for(|wanted| !wanted) => {}
            }
            drop(listener);
            let held = self.hold_again().await;
            if wanted.wait_for(|wanted| *wanted).await.is_err() {
                return;
            }
            listener = self.listen_again(held).await;
        }
    }

    /// Takes the port that was ours just now: a socket that is about to go can be in the way for a moment.
    async fn hold_again(&self) -> TcpSocket {
        let began = Instant::now();
        loop {
            match hold(self.listen) {
                Ok(held) => return held,
                Err(error) if PATIENCE < began.elapsed() => panic!("{}: {error}", self.listen),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// The same when it is listened at: the system looks at the port anew.
    async fn listen_again(&self, mut held: TcpSocket) -> TcpListener {
        let began = Instant::now();
        loop {
            match held.listen(BACKLOG) {
                Ok(listener) => return listener,
                Err(error) if PATIENCE < began.elapsed() => panic!("{}: {error}", self.listen),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
            held = self.hold_again().await;
        }
    }

    async fn accept(&self, listener: &TcpListener, connections: &mut JoinSet<()>) {
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    // One that is gone before it was taken is nobody's loss.
                    let Ok((stream, peer)) = accepted else { continue };
                    let (origin, listen) = (self.origin.clone(), self.listen);
                    let (lanes, target) = (self.lanes.clone(), self.target);
                    // Looking takes time, in which all other connections go on.
                    let looking = tokio::task::spawn_blocking(move || origin(peer, listen));
                    connections.spawn(async move {
                        let Ok(origin) = looking.await else { return };
                        let state = {
                            let mut lanes = lanes.lock().unwrap_or_else(PoisonError::into_inner);
                            lanes.of(&origin).subscribe()
                        };
                        connection(stream, target, state).await;
                    });
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

async fn connection(mut near: TcpStream, target: SocketAddr, state: watch::Receiver<State>) {
    let broken = broken(state.clone());
    tokio::pin!(broken);
    let far = tokio::select! {
        far = dial(target, state.clone()) => far,
        door = &mut broken => return end(&[&near], door),
    };
    let Ok(mut far) = far else { return end(&[&near], Door::Reset) };
    let door = tokio::select! {
        door = join(&mut near, &mut far, state) => door,
        door = &mut broken => door,
    };
    end(&[&near, &far], door);
}

/// They are dropped after it.
fn end(streams: &[&TcpStream], door: Door) {
    if door == Door::Reset {
        // One that has ended already cannot be reset.
        streams.iter().for_each(|stream| _ = stream.set_zero_linger());
    }
}

/// When no connection may be.
async fn broken(mut state: watch::Receiver<State>) -> Door {
    let born = state.borrow().resets;
    let is_over = |state: &State| state.fault.door != Door::Open || state.resets != born;
    match state.wait_for(is_over).await {
        Ok(state) if state.fault.door == Door::Shut => Door::Shut,
        _ => Door::Reset,
    }
}

async fn dial(target: SocketAddr, mut state: watch::Receiver<State>) -> io::Result<TcpStream> {
    // What is silent does not even knock there.
    _ = state.wait_for(|state| state.fault.up != Flow::Silent).await;
    let stream = timeout(DIAL_MAX, TcpStream::connect(target)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    /// Long enough to see that nothing comes.
    const SILENCE: Duration = Duration::from_millis(100);
    const ME: &str = "me";

    /// A proxy before a listener that gives back what it hears.
    fn echo() -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let target = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || {
                    let mut other = stream.try_clone().unwrap();
                    _ = std::io::copy(&mut stream, &mut other);
                    _ = other.shutdown(Shutdown::Write);
                });
            }
        });
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Proxy::start(any, target, Arc::new(|_, _| ME.to_owned()))
    }

    fn dial(proxy: &Proxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.addr()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn say(mut stream: &TcpStream, text: &[u8]) {
        stream.write_all(text).unwrap();
    }

    fn hear(mut stream: &TcpStream, length: usize) -> Vec<u8> {
        let mut heard = vec![0; length];
        stream.read_exact(&mut heard).unwrap();
        heard
    }

    fn assert_silent(mut stream: &TcpStream) {
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        let error = stream.read(&mut [0; 1]).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }

    #[test]
    fn everything_passes_in_order_and_so_does_the_end() {
        let proxy = echo();
        let stream = dial(&proxy);
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let heard = std::thread::scope(|scope| {
            scope.spawn(|| {
                say(&stream, &sent);
                stream.shutdown(Shutdown::Write).unwrap();
            });
            let mut heard = Vec::new();
            (&stream).read_to_end(&mut heard).unwrap();
            heard
        });
        assert!(heard == sent, "{} of {} bytes came back", heard.len(), sent.len());
    }

    #[test]
    fn what_a_silent_link_holds_back_comes_when_it_is_healed() {
        for fault in [Fault::HALF_OPEN, Fault::DEAF_UP, Fault::DEAF_DOWN] {
            let proxy = echo();
            let before = dial(&proxy);
            say(&before, b"one");
            assert_eq!(hear(&before, 3), b"one");
            proxy.set(ME, fault);
            say(&before, b"two");
            assert_silent(&before);
            // A new one is accepted, and hears nothing.
            let new = dial(&proxy);
            say(&new, b"new");
            assert_silent(&new);
            proxy.set(ME, Fault::NONE);
            assert_eq!(hear(&before, 3), b"two");
            assert_eq!(hear(&new, 3), b"new");
        }
    }

    #[test]
    fn the_other_direction_of_a_one_way_fault_works() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let target = listener.local_addr().unwrap();
        let proxy = Proxy::start(any, target, Arc::new(|_, _| ME.to_owned()));
        let near = dial(&proxy);
        let (far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        proxy.set_all(Fault::DEAF_UP);
        say(&far, b"down");
        assert_eq!(hear(&near, 4), b"down");
        say(&near, b"up");
        assert_silent(&far);
        proxy.set_all(Fault::DEAF_DOWN);
        assert_eq!(hear(&far, 2), b"up");
        say(&far, b"more");
        assert_silent(&near);
    }

    #[test]
    fn a_cut_ends_what_is_open_and_a_reset_says_so() {
        let proxy = echo();
        let read = |stream: &TcpStream| (&*stream).read(&mut [0; 1]).map_err(|e| e.kind());
        let open = |proxy: &Proxy| {
            let stream = dial(proxy);
            say(&stream, b"a");
            assert_eq!(hear(&stream, 1), b"a");
            stream
        };
        let stream = open(&proxy);
        proxy.set(ME, Fault::CUT);
        assert_eq!(read(&stream), Ok(0));
        // Ended before anything was read of it.
        assert!(matches!(read(&dial(&proxy)), Ok(0) | Err(io::ErrorKind::ConnectionReset)));
        proxy.set(ME, Fault::NONE);
        let stream = open(&proxy);
        proxy.set(ME, Fault::RESET);
        assert_eq!(read(&stream), Err(io::ErrorKind::ConnectionReset));
        proxy.set(ME, Fault::NONE);
        let stream = open(&proxy);
        proxy.reset(ME);
        assert_eq!(read(&stream), Err(io::ErrorKind::ConnectionReset));
        drop(open(&proxy));
    }

    #[test]
    fn a_late_link_is_late_in_both_directions_and_slices_are_whole() {
        let proxy = echo();
        let stream = dial(&proxy);
        let by = Duration::from_millis(60);
        proxy.set(ME, Fault::late(by, Duration::from_millis(5)));
        let began = Instant::now();
        for number in 0..100_u8 {
            say(&stream, &[number]);
        }
        assert_eq!(hear(&stream, 100), (0..100).collect::<Vec<_>>());
        assert!(2 * by <= began.elapsed(), "{:?}", began.elapsed());
        proxy.set(ME, Fault::slices(3, Duration::from_millis(1)));
        say(&stream, b"ten bytes.");
        assert_eq!(hear(&stream, 10), b"ten bytes.");
    }

    #[test]
    fn one_dialler_is_cut_and_others_are_not() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let origin = Arc::new(|peer: SocketAddr, _| peer.port().to_string());
        let proxy = Proxy::start(any, listener.local_addr().unwrap(), origin);
        let [one, other] = [(); 2].map(|()| dial(&proxy));
        let far = [(); 2].map(|()| listener.accept().unwrap().0);
        proxy.set(&one.local_addr().unwrap().port().to_string(), Fault::CUT);
        assert_eq!((&one).read(&mut [0; 1]).unwrap(), 0);
        far.iter().for_each(|stream| _ = (&*stream).write(b"x"));
        assert_eq!(hear(&other, 1), b"x");
    }

    #[test]
    fn a_port_that_is_not_listened_on_refuses_and_comes_back() {
        let proxy = echo();
        proxy.listen(false);
        super::super::eventually_true(PATIENCE, "it refuses", || {
            TcpStream::connect(proxy.addr()).is_err()
        });
        proxy.listen(true);
        super::super::eventually_true(PATIENCE, "it listens", || {
            TcpStream::connect(proxy.addr()).is_ok()
        });
        let stream = dial(&proxy);
        say(&stream, b"a");
        assert_eq!(hear(&stream, 1), b"a");
    }
}
