//! The gRPC service of the store role: checks the sender, calls the files, answers.

use std::pin::Pin;
use std::sync::Arc;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{self, FuturesUnordered, Stream};
use net::grpc::PeerInfo;
use proto::link::read_request::Read;
use proto::link::read_response::Answer;
use proto::link::store_service_server::StoreService;
use proto::link::write_request::Write;
use proto::link::write_response::Outcome;
use proto::link::{
    Committed, Fenced, HeadMismatch, Pruned, ReadRequest, ReadResponse, WorksPage, WriteRequest,
    WriteResponse,
};
use proto::status::Failure;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{is_true, pages, rights};
use crate::{CommitOutcome, ControlOutcome, Error, FenceOutcome, FileStore, Store};

/// Writes of one stream that wait for the files; then the stream is not read.
const IN_FLIGHT_MAX: usize = 4_096;
/// Answers of one stream that wait for the network.
const ANSWERS_MAX: usize = 256;

pub(super) struct Service {
    store: FileStore,
    stopped: watch::Receiver<bool>,
}

impl Service {
    pub(super) fn new(store: FileStore, stopped: watch::Receiver<bool>) -> Self {
        Self { store, stopped }
    }
}

#[tonic::async_trait]
impl StoreService for Service {
    type WriteStream = ReceiverStream<Result<WriteResponse, Status>>;

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let peer = rights::peer(&request)?;
        let (answers, stream) = mpsc::channel(ANSWERS_MAX);
        let session = Session {
            store: self.store.clone(),
            peer,
            answers,
            in_flight: FuturesUnordered::new(),
        };
        tokio::spawn(session.run(request.into_inner(), is_true(self.stopped.clone())));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ReadStream = Pin<Box<dyn Stream<Item = Result<ReadResponse, Status>> + Send>>;

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let peer = rights::peer(&request)?;
        let ReadRequest { database, read } = request.into_inner();
        let Some(read) = read else {
            return Err(Failure::invalid("read", "a read of an unknown kind").into());
        };
        rights::check(&peer, rights::of_read(&read)).map_err(Failure::from)?;
        let answers = match answer(&self.store, &database, read).await {
            Ok(answers) => answers,
            Err(error) => vec![Answer::Failure(error.to_wire())],
        };
        let pages = answers.into_iter().map(|answer| Ok(ReadResponse { answer: Some(answer) }));
        Ok(Response::new(Box::pin(stream::iter(pages))))
    }
}

async fn answer(store: &FileStore, database: &str, read: Read) -> Result<Vec<Answer>, Error> {
    let answer = match read {
        Read::Owner(_) => Answer::Owner(store.owner(database).await?),
        Read::Agent(read) => Answer::Agent(store.agent(database, &read).await?),
        Read::History(read) => Answer::Log(store.history(database, &read).await?),
        Read::Histories(read) => Answer::Log(store.histories(database, &read).await?),
        Read::Recovery(_) => return Ok(pages::of_recovery(store.recover(database).await?)),
        Read::Work(read) => {
            let found = store.work(database, read.id).await?;
            let (works, agents) = found.into_iter().unzip();
            Answer::Works(WorksPage { works, agents })
        }
        Read::Works(read) => Answer::Works(store.works(database, &read).await?),
        Read::Agents(read) => Answer::Agents(store.agents(database, &read).await?),
        Read::Definition(read) => {
            let found = store.definition(database, &read.hash).await?;
            return Ok(found.map(Answer::Definition).into_iter().collect());
        }
        Read::Control(read) => {
            if database != "control" {
                return Err(Error::invalid(format!(
                    "database {database} is not the control database"
                )));
            }
            return Ok(pages::of_control(store.read_control(&read).await?));
        }
        Read::Check(_) => Answer::Check(store.check(database).await?),
        Read::Backup(read) => {
            store.backup(database, &read.to).await?;
            return Ok(Vec::new());
        }
    };
    Ok(vec![answer])
}

/// One stream of writes.
struct Session {
    store: FileStore,
    peer: PeerInfo,
    answers: mpsc::Sender<Result<WriteResponse, Status>>,
    in_flight: FuturesUnordered<BoxFuture<'static, WriteResponse>>,
}

impl Session {
    /// Until the client ends it or the store is to stop; then what is in flight is still answered.
    async fn run(
        mut self,
        mut requests: Streaming<WriteRequest>,
        stopped: impl Future<Output = ()>,
    ) {
        let mut stopped = Box::pin(stopped);
        loop {
            tokio::select! {
                request = requests.message(), if self.in_flight.len() < IN_FLIGHT_MAX => match request {
                    Ok(Some(request)) => self.begin(request),
                    Ok(None) | Err(_) => break,
                },
                Some(response) = self.in_flight.next() => {
                    if self.answers.send(Ok(response)).await.is_err() {
                        return;
                    }
                }
                () = &mut stopped => break,
            }
        }
        while let Some(response) = self.in_flight.next().await {
            if self.answers.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }

    /// Puts a write in line at once, so that the writes of a database keep the order in which they came.
    fn begin(&mut self, request: WriteRequest) {
        let id = request.id;
        let outcome = self.start(request).unwrap_or_else(|error| Box::pin(async { Err(error) }));
        self.in_flight.push(Box::pin(async move {
            let outcome = outcome.await.unwrap_or_else(failure);
            WriteResponse { id, outcome: Some(outcome) }
        }));
    }

    fn start(
        &self,
        request: WriteRequest,
    ) -> Result<BoxFuture<'static, Result<Outcome, Error>>, Error> {
        let WriteRequest { database, write, .. } = request;
        let write = write.ok_or_else(|| Error::invalid("a write of an unknown kind"))?;
        rights::check(&self.peer, rights::of_write(&write))?;
        Ok(match write {
            Write::Group(group) => {
                let pending = self.store.start_commit(&database, Arc::new(group))?;
                Box::pin(async { Ok(of_commit(pending.wait().await?)) })
            }
            Write::Fence(fence) => {
                let pending = self.store.start_fence(&database, fence)?;
                Box::pin(async {
                    let (FenceOutcome::Fenced(row) | FenceOutcome::Lost(row)) =
                        pending.wait().await?;
                    Ok(Outcome::Owner(row))
                })
            }
            Write::Provision(provision) => {
                let pending = self.store.start_provision(&database, provision)?;
                Box::pin(async { Ok(Outcome::Owner(pending.wait().await?)) })
            }
            Write::Prune(prune) => {
                let store = self.store.clone();
                Box::pin(async move {
                    let rows = store.prune(&database, &prune).await?;
                    Ok(Outcome::Pruned(Pruned { rows }))
                })
            }
            Write::Control(batch) => {
                if database != "control" {
                    return Err(Error::invalid(format!(
                        "database {database} is not the control database"
                    )));
                }
                let pending = self.store.start_control(batch)?;
                Box::pin(async { Ok(of_control(pending.wait().await?)) })
            }
        })
    }
}

fn failure(error: Error) -> Outcome {
    if let Error::Fenced { epoch } = error {
        return Outcome::Fenced(Fenced { epoch });
    }
    Outcome::Failure(error.to_wire())
}

fn of_commit(outcome: CommitOutcome) -> Outcome {
    match outcome {
        CommitOutcome::Committed => Outcome::Committed(Committed {}),
        CommitOutcome::Fenced { epoch } => Outcome::Fenced(Fenced { epoch }),
        CommitOutcome::HeadMismatch { head } => Outcome::Head(HeadMismatch { head }),
    }
}

/// The client reads the leader row itself: it may have changed again by then.
fn of_control(outcome: ControlOutcome) -> Outcome {
    match outcome {
        ControlOutcome::Done(answer) => Outcome::Control(answer),
        ControlOutcome::NotLeader(leader) => Outcome::Fenced(Fenced { epoch: leader.term }),
    }
}
