//! One call: repeated over connections and addresses until it is answered, refused for good, or out of time.

use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::error::is_transport;
use crate::pool::Link;
use crate::retry::Patience;
use crate::{Client, Error};

impl Client {
    /// Calls `rpc` until there is an answer to pass on. `rpc` must be safe to repeat.
    pub(crate) async fn call<Q, A, F, R>(
        &self,
        method: &'static str,
        request: Q,
        rpc: R,
    ) -> Result<A, Error>
    where
        Q: Clone,
        R: Fn(Channel, Request<Q>) -> F,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut patience = Patience::new(&self.timeouts);
        loop {
            let attempt = self.attempt(request.clone(), patience.deadline(), Limit::Whole, &rpc);
            // Boxed: the future of a call is large, and callers keep it in theirs.
            let error = match Box::pin(attempt).await {
                Ok((answer, _)) => return Ok(answer),
                Err(error) => error,
            };
            self.pause(&mut patience, method, error).await?;
        }
    }

    /// Waits before the next attempt, or gives the error back if there is to be none.
    pub(crate) async fn pause(
        &self,
        patience: &mut Patience,
        method: &'static str,
        error: Error,
    ) -> Result<(), Error> {
        let reached = self.pool.reached();
        let text = error.to_string();
        let pause = patience.pause(error, reached)?;
        tracing::debug!(method, error = text, pause_ms = pause.as_millis() as u64, "trying again");
        sleep(pause).await;
        Ok(())
    }

    /// One attempt over one connection.
    pub(crate) async fn attempt<Q, A, F, R>(
        &self,
        request: Q,
        deadline: Instant,
        limit: Limit,
        rpc: &R,
    ) -> Result<(A, Link), Error>
    where
        R: Fn(Channel, Request<Q>) -> F,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let link = self.pool.link(deadline).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        let mut request = Request::new(request);
        if limit == Limit::Whole {
            request.set_timeout(left);
        }
        proto::trace::inject(request.metadata_mut(), telemetry::current_traceparent().as_deref());
        match timeout_at(deadline, rpc(link.channel.clone(), request)).await {
            Ok(Ok(answer)) => Ok((answer.into_inner(), link)),
            Ok(Err(status)) => Err(self.failed(&link, status)),
            Err(_) => {
                // Whoever did not answer in time is not asked first the next time.
                self.pool.drop_link(&link);
                Err(Error::Deadline { after: self.timeouts.call })
            }
        }
    }

    /// What a failed attempt means; after it the next one goes to the next address, unless this one had an answer.
    pub(crate) fn failed(&self, link: &Link, status: Status) -> Error {
        if is_timeout(&status) {
            return Error::Deadline { after: self.timeouts.call };
        }
        if is_transport(&status) {
            self.pool.drop_link(link);
            let addresses = self.addresses().to_vec();
            return Error::NotReached { addresses, source: status.into() };
        }
        if status.code() == tonic::Code::Unavailable {
            self.pool.drop_link(link);
        }
        Error::refused(status)
    }
}

/// What the deadline holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// The whole call: the server is told.
    Whole,
    /// The beginning of a stream.
    Begin,
}

/// Our own clock ended it, not the server.
fn is_timeout(status: &Status) -> bool {
    status.message() == "Timeout expired"
}
