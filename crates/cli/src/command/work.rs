//! `submit` and `work`.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use client::{Client, Error};
use domain::{AgentId, Reason};
use proto::convert;
use proto::v1::signal_request::{self, Resolution, Step};
use proto::v1::{
    ListRequest, ListResponse, OpenWatch, SignalRequest, SubmitRequest, Work, WorkEvent,
    open_response, work_event,
};
use tokio::time::timeout;
use tracing::Instrument;

use crate::args::{Format, Owner, SubmitArgs, WorkArgs, WorkCommand};
use crate::credentials::connect;
use crate::exit::{Exit, Failure};
use crate::output;

const INPUT_BYTES_MAX: u64 = proto::convert::INPUT_BYTES_MAX as u64;
/// How long after a work's own deadline its end is waited for.
const GRACE: Duration = Duration::from_secs(30);
const PAGE_SIZE_MAX: u32 = 200;
/// No work may take longer.
const TIMEOUT_MAX: Duration = Duration::from_hours(24);

/// `submit`.
pub(crate) async fn submit(args: SubmitArgs) -> Result<Exit, Failure> {
    check_timeout(args.connection.timeout)?;
    let input = input_of(&args)?;
    let client = connect(&args.connection)?;
    let tenant = args.owner.tenant.clone();
    let id = AgentId { tenant, name: args.agent.clone(), key: args.key.clone() };
    let request = SubmitRequest {
        agent: id.to_string(),
        input,
        idempotency_key: args.idempotency_key.as_ref().map(ToString::to_string).unwrap_or_default(),
        timeout: args.connection.timeout.map(Into::into),
        definition_hash: args.definition_hash.map(|hash| hash.to_string()).unwrap_or_default(),
    };
    let format = args.connection.output;
    if !args.watch {
        let work = client.submit(request).await?;
        output::print(format, &work, output::work)?;
        return Ok(output::exit_of(&work));
    }
    let mut events = output::Events::new(format);
    let mut show = |event: &WorkEvent| events.show(event);
    let span = tracing::info_span!("submit", agent = request.agent);
    let end = follow_submit(&client, request, &mut show).instrument(span);
    let time = args.connection.deadline() + GRACE;
    match timeout(time, end).await {
        Ok(end) => Ok(output::exit_of(&end?)),
        Err(_) => Err(Error::Deadline { after: time }.into()),
    }
}

fn check_timeout(timeout: Option<Duration>) -> Result<(), Failure> {
    match timeout.is_some_and(|timeout| TIMEOUT_MAX < timeout) {
        true => Err(Failure::usage("--timeout of a submit is too long")
            .why("a work has at most 24 hours")
            .remedy("use at most 1440m")),
        false => Ok(()),
    }
}

/// Submits a work and shows its events until it ends; the work as it ended.
pub(crate) async fn follow_submit(
    client: &Client,
    request: SubmitRequest,
    show: &mut (dyn FnMut(&WorkEvent) -> Result<(), Failure> + Send),
) -> Result<Work, Failure> {
    const TAG: i64 = 1;
    let (sender, mut responses) = client.open().split();
    let asked = sender.submit(TAG, request, OpenWatch::All).await;
    // Without a sender the stream ends with the work.
    drop(sender);
    if let Err(error) = asked
        && !matches!(error, Error::Ended)
    {
        return Err(error.into());
    }
    while let Some(response) = responses.next().await {
        match response?.response {
            Some(open_response::Response::Refused(refused)) => {
                return Err(Error::of_refused(refused).into());
            }
            Some(open_response::Response::Event(event)) => {
                show(&event)?;
                if let Some(work_event::Event::Result(work)) = event.event {
                    return Ok(work);
                }
            }
            Some(open_response::Response::Accepted(_)) | None => {}
        }
    }
    Err(Error::Ended.into())
}

/// So that a signal whose answer is lost can be sent again. 0: none, which the owner says better.
fn attempt_in_doubt(work: &Work) -> i32 {
    let doubted = work.steps.iter().rfind(|step| step.reason == Reason::InDoubt.as_str());
    doubted.map_or(0, |step| step.attempts)
}

/// `work`.
pub(crate) async fn run(args: WorkArgs) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let format = args.connection.output;
    match args.command {
        WorkCommand::Get { id } => {
            let work = client.get(&id.to_string()).await?;
            output::print(format, &work, output::work)?;
            Ok(Exit::Ok)
        }
        WorkCommand::Cancel { id } => {
            let work = client.cancel(&id.to_string()).await?;
            output::print(format, &work, output::work)?;
            Ok(Exit::Ok)
        }
        WorkCommand::Signal { id, done, retry, fail: _, step, attempt } => {
            let resolution = match (done, retry) {
                (Some(output), _) => Resolution::Done(signal_request::Done { output }),
                (None, true) => Resolution::Retry(signal_request::Retry {}),
                (None, false) => Resolution::Fail(signal_request::Fail {}),
            };
            let step = step.map(|step| match step.parse() {
                Ok(sequence) => Step::Sequence(sequence),
                Err(_) => Step::Name(step),
            });
            let (id, resolution) = (id.to_string(), Some(resolution));
            let attempt = match attempt {
                Some(attempt) => attempt,
                None => attempt_in_doubt(&client.get(&id).await?),
            };
            let work = client.signal(SignalRequest { id, step, attempt, resolution }).await?;
            output::print(format, &work, output::work)?;
            Ok(Exit::Ok)
        }
        WorkCommand::List { agent, limit, state } => {
            let state = state.map_or(0, |state| convert::api_state(state).into());
            let request = ListRequest { state, ..list_of(agent, &args.owner) };
            list(&client, request, limit, format).await
        }
        WorkCommand::Watch { id, cursor } => {
            let id = id.to_string();
            let watch = watch(&client, &id, &cursor, format);
            match args.connection.timeout {
                None => watch.await,
                Some(time) => timeout(time, watch)
                    .await
                    .unwrap_or_else(|_| Err(Error::Deadline { after: time }.into())),
            }
        }
    }
}

async fn watch(client: &Client, id: &str, cursor: &str, format: Format) -> Result<Exit, Failure> {
    let mut watch = client.watch(id, cursor);
    let (mut exit, mut events) = (Exit::Ok, output::Events::new(format));
    while let Some(event) = watch.next().await {
        let event = event?;
        events.show(&event)?;
        if let Some(work_event::Event::Result(work)) = &event.event {
            exit = output::exit_of(work);
        }
    }
    Ok(exit)
}

/// Page by page; as JSON each page is one document.
async fn list(
    client: &Client,
    mut request: ListRequest,
    limit: u32,
    format: Format,
) -> Result<Exit, Failure> {
    let mut left = limit;
    while 0 < left {
        request.page_size = left.min(PAGE_SIZE_MAX) as i32;
        let page = client.list(request.clone()).await?;
        output::print(format, &page, works)?;
        left = left.saturating_sub(u32::try_from(page.works.len()).unwrap_or(u32::MAX));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    Ok(Exit::Ok)
}

fn list_of(agent: Option<AgentId>, owner: &Owner) -> ListRequest {
    ListRequest {
        // An agent's id names its tenant.
        tenant: agent.as_ref().map_or(&owner.tenant, |id| &id.tenant).to_string(),
        agent: agent.map(|id| id.to_string()).unwrap_or_default(),
        ..ListRequest::default()
    }
}

fn works(page: &ListResponse) -> String {
    let rows = page.works.iter().map(|work| {
        [
            work.id.clone(),
            work.agent.clone(),
            output::state(work.state()),
            work.reason.clone(),
            output::time(work.create_time.as_ref()),
        ]
    });
    let table = output::table(["WORK", "AGENT", "STATE", "REASON", "CREATED"], rows.collect());
    match page.unreachable.is_empty() {
        true => table,
        false => {
            format!("{table}\nwithout the shards {:?}, which did not answer", page.unreachable)
        }
    }
}

fn input_of(args: &SubmitArgs) -> Result<String, Failure> {
    match (&args.file, &args.text) {
        (Some(path), _) => read_file(path),
        (None, Some(text)) => check(text.clone().into_bytes(), "--text"),
        (None, None) => read_stdin(),
    }
}

/// The input of a work, from a file.
pub(crate) fn read_file(path: &Path) -> Result<String, Failure> {
    let name = path.display().to_string();
    let failed =
        |error| Failure::usage(format!("cannot read {name}")).why(error).remedy("name a text file");
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(INPUT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    check(bytes, &name)
}

fn read_stdin() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().take(INPUT_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| Failure::usage("cannot read standard input").why(error))?;
    check(bytes, "standard input")
}

fn check(bytes: Vec<u8>, name: &str) -> Result<String, Failure> {
    if INPUT_BYTES_MAX < bytes.len() as u64 {
        return Err(Failure::usage(format!("{name} is too long"))
            .why(format!("the input of a work has at most {INPUT_BYTES_MAX} bytes (1 MiB)"))
            .remedy("split it into several works"));
    }
    String::from_utf8(bytes).map_err(|_| {
        Failure::usage(format!("{name} is not text"))
            .why("it is not UTF-8")
            .remedy("convert it, for example with iconv")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_over_its_limit_is_refused_with_limit_and_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big.txt");
        std::fs::write(&path, vec![b'x'; INPUT_BYTES_MAX as usize]).unwrap();
        assert_eq!(read_file(&path).unwrap().len() as u64, INPUT_BYTES_MAX);
        std::fs::write(&path, vec![b'x'; INPUT_BYTES_MAX as usize + 1]).unwrap();
        let failure = read_file(&path).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        let text = failure.to_string();
        assert!(text.contains("big.txt") && text.contains("1 MiB"), "{text}");
    }

    #[test]
    fn a_work_has_at_most_a_day() {
        assert!(check_timeout(None).is_ok() && check_timeout(Some(TIMEOUT_MAX)).is_ok());
        let failure = check_timeout(Some(TIMEOUT_MAX + Duration::from_millis(1))).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("24 hours"), "{failure}");
    }

    #[test]
    fn a_file_that_is_missing_or_no_text_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.png");
        for _ in 0..2 {
            let failure = read_file(&path).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.to_string().contains("image.png"), "{failure}");
            std::fs::write(&path, [0xff, 0xfe]).unwrap();
        }
    }
}
