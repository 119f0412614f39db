//! `dev`: a whole cluster on this machine, small and no mock: every process is real, and so is every certificate.
//!
//! Starts the processes, says when they can take work, says which died, and leaves nothing running behind.

mod children;
mod cluster;
mod home;
mod plan;
mod server;

pub(crate) use cluster::{Cluster, Options};

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use crate::args::{DevArgs, Format};
use crate::credentials::default_data_dir;
use crate::exit::{Exit, Failure};
use crate::output;
use crate::signal::Shutdown;
use server::ServerStore;

/// `dev`.
pub(crate) async fn run(args: DevArgs) -> Result<Exit, Failure> {
    check_loopback(args.api)?;
    let began = Instant::now();
    let mut shutdown = Shutdown::new(args.stdin_guard)?;
    let data_dir = match &args.data_dir {
        Some(given) => given.clone(),
        None => default_data_dir()?,
    };
    let is_default = args.data_dir.is_none();
    let store = ServerStore::of(&args.store)?;
    let DevArgs { nodes, controls, api, restart, .. } = args;
    let options = Options { data_dir, nodes, controls, api, restart, store };
    let mut cluster = Cluster::start(options)?;
    let ready = tokio::select! {
        ready = cluster.ready() => Some(ready),
        () = shutdown.wait() => None,
    };
    let outcome = match ready {
        Some(Ok(())) => {
            announce(&cluster, args.output, is_default, began)?;
            tokio::select! {
                () = cluster.watch() => {}
                () = shutdown.wait() => {}
            }
            Ok(Exit::Ok)
        }
        Some(Err(failure)) => Err(failure),
        None => Ok(Exit::Ok),
    };
    cluster.stop().await;
    outcome
}

fn check_loopback(api: SocketAddr) -> Result<(), Failure> {
    match api.ip() == Ipv4Addr::LOCALHOST {
        true => Ok(()),
        false => Err(Failure::usage(format!("address {api} is not on 127.0.0.1"))
            .why("`stagedoor dev` serves this machine only")
            .remedy("use 127.0.0.1, or run the roles by themselves")),
    }
}

fn announce(
    cluster: &Cluster,
    format: Format,
    is_default: bool,
    began: Instant,
) -> Result<(), Failure> {
    output::print(format, &cluster.announcement(), |ready| {
        let processes: Vec<_> = ready
            .processes
            .iter()
            .map(|process| [process.role.to_owned(), process.name.clone(), process.pid.to_string()])
            .collect();
        let credentials = match is_default {
            true => String::new(),
            false => format!(" --credentials {}", ready.credentials),
        };
        format!(
            "ready in {} ms, API at {}\n\n{}\n\nlogs in {}\n\ntry in another terminal:\n  \
             stagedoor submit --agent postchain --key first --file README.md --watch{credentials}\n\n\
             Ctrl-C ends it.",
            began.elapsed().as_millis(),
            ready.api,
            output::table(["ROLE", "NAME", "PID"], processes),
            cluster.logs().display(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_served() {
        assert!(check_loopback("127.0.0.1:7700".parse().unwrap()).is_ok());
        // Its other listeners are on 127.0.0.1, and so are those of which only a port was asked for.
        for other in ["0.0.0.0:7700", "[::1]:0", "127.0.0.2:0"] {
            let failure = check_loopback(other.parse().unwrap()).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.to_string().contains(other), "{failure}");
        }
    }
}
