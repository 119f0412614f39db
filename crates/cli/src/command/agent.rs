//! `definitions`, `apply` and `agents`.

use std::path::Path;

use client::Client;
use proto::v1::{
    Agent, ApplyDefinitionRequest, Definition, DefinitionVersion, GetDefinitionRequest,
    HistoryEntry, ListAgentsRequest, ListAgentsResponse, ListDefinitionsRequest,
    ListDefinitionsResponse,
};
use toml::Value;

use crate::args::{AgentsArgs, AgentsCommand, ApplyArgs, DefinitionsArgs, Format, Owner};
use crate::credentials::connect;
use crate::exit::{Exit, Failure};
use crate::output;

/// What shows the agents that there are.
const LIST: &str = "stagedoor agents";

/// `definitions`.
pub(crate) async fn definitions(args: DefinitionsArgs) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let format = args.connection.output;
    let tenant = args.owner.tenant.to_string();
    if let Some(name) = args.name {
        let hash = args.hash.map(|hash| hash.to_string()).unwrap_or_default();
        let request = GetDefinitionRequest { tenant, name: name.to_string(), hash };
        output::print(format, &client.definition(request).await?, version)?;
        return Ok(Exit::Ok);
    }
    let mut request = ListDefinitionsRequest { tenant, ..ListDefinitionsRequest::default() };
    loop {
        let page = client.definitions(request.clone()).await?;
        output::print(format, &page, versions)?;
        if page.next_page_token.is_empty() {
            return Ok(Exit::Ok);
        }
        request.page_token = page.next_page_token;
    }
}

/// `apply`.
pub(crate) async fn apply(args: ApplyArgs) -> Result<Exit, Failure> {
    let definition = read(&args.file)?;
    let client = connect(&args.connection)?;
    let request = ApplyDefinitionRequest {
        tenant: args.owner.tenant.to_string(),
        definition: Some(definition),
    };
    output::print(args.connection.output, &client.apply(request).await?, version)?;
    Ok(Exit::Ok)
}

/// `agents`.
pub(crate) async fn run(args: AgentsArgs) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let format = args.connection.output;
    match args.command {
        None | Some(AgentsCommand::List) => list(&client, &args.owner, format).await?,
        Some(AgentsCommand::Get { id }) => {
            let found = client.agent(&id.to_string()).await;
            output::print(format, &found.map_err(|error| Failure::of_one(error, LIST))?, agent)?;
        }
        Some(AgentsCommand::History { id, limit }) => {
            let mut history = client.history(&id.to_string(), limit);
            while let Some(read) = history.next().await {
                let read = read.map_err(|error| Failure::of_one(error, LIST))?;
                output::print(format, &read, entry)?;
            }
        }
    }
    Ok(Exit::Ok)
}

async fn list(client: &Client, owner: &Owner, format: Format) -> Result<(), Failure> {
    let tenant = owner.tenant.to_string();
    let mut request = ListAgentsRequest { tenant, ..ListAgentsRequest::default() };
    loop {
        let page = client.agents(request.clone()).await?;
        output::print(format, &page, agents)?;
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        request.page_token = page.next_page_token;
    }
}

/// A definition from a TOML file. A field that does not exist is an error with its line.
fn read(path: &Path) -> Result<Definition, Failure> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::usage(format!("cannot read {name}")).why(error).remedy("name a TOML file")
    })?;
    toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let field = text.lines().nth(line - 1).and_then(|line| line.split_once('='));
        let field = field.map(|(field, _)| field.trim());
        Failure::usage(format!("{name}, line {line}"))
            .why(match field.filter(|field| !error.message().contains(*field)) {
                Some(field) => format!("{field}: {}", error.message()),
                None => error.message().to_owned(),
            })
            .remedy("correct the file; `stagedoor apply --help` names the fields")
    })
}

fn versions(page: &ListDefinitionsResponse) -> String {
    let rows = page.versions.iter().map(|version| {
        let definition = version.definition.clone().unwrap_or_default();
        let origin = if version.built_in { "built in" } else { "applied" };
        [
            definition.name,
            definition.behaviour,
            definition.model,
            origin.to_owned(),
            output::time(version.create_time.as_ref()),
            version.hash.clone(),
        ]
    });
    let headings = ["DEFINITION", "BEHAVIOUR", "MODEL", "ORIGIN", "CREATED", "HASH"];
    output::table(headings, rows.collect())
}

/// As a file that `apply` takes.
fn version(version: &DefinitionVersion) -> String {
    let definition = version.definition.clone().unwrap_or_default();
    let text = |value: String| Value::String(value);
    let number = |value: i32| Value::Integer(value.into());
    let fields = [
        ("name", text(definition.name)),
        ("behaviour", text(definition.behaviour)),
        ("model", text(definition.model)),
        ("instructions", text(definition.instructions)),
        ("phases", Value::Array(definition.phases.into_iter().map(text).collect())),
        ("cycles_max", number(definition.cycles_max)),
        ("modality", text(definition.modality)),
        ("attempts_max", number(definition.attempts_max)),
        ("tools", Value::Array(definition.tools.into_iter().map(text).collect())),
        ("rounds_max", number(definition.rounds_max)),
        ("in_doubt", text(definition.in_doubt)),
    ];
    // What is not set is of the other behaviour.
    let is_set =
        |value: &Value| !matches!(value.as_str(), Some("")) && value.as_integer() != Some(0);
    let is_some = |value: &Value| value.as_array().is_none_or(|list| !list.is_empty());
    let lines = fields.into_iter().filter(|(name, value)| {
        matches!(*name, "instructions" | "cycles_max") || (is_set(value) && is_some(value))
    });
    let lines: Vec<_> = lines.map(|(name, value)| format!("{name} = {value}")).collect();
    format!("# {} of tenant {}\n{}", version.hash, version.tenant, lines.join("\n"))
}

fn agents(page: &ListAgentsResponse) -> String {
    let rows = page.agents.iter().map(|agent| {
        [
            agent.id.clone(),
            agent.state.clone(),
            agent.shard.to_string(),
            agent.node.clone(),
            agent.open_works.to_string(),
            agent.last_work.clone(),
        ]
    });
    let headings = ["AGENT", "STATE", "SHARD", "NODE", "OPEN WORKS", "LAST WORK"];
    let table = output::table(headings, rows.collect());
    match page.unreachable.is_empty() {
        true => table,
        false => {
            format!("{table}\nwithout the shards {:?}, which did not answer", page.unreachable)
        }
    }
}

fn agent(agent: &Agent) -> String {
    let reason = match agent.reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    format!(
        "agent       {}\nstate       {}{reason}\nshard       {} on {}\nentries     {}\n\
         open works  {}\nlast work   {}\nrestarts    {}",
        agent.id,
        agent.state,
        agent.shard,
        agent.node,
        agent.head,
        agent.open_works,
        agent.last_work,
        agent.restarts,
    )
}

fn entry(entry: &HistoryEntry) -> String {
    let time = output::time(entry.time.as_ref());
    let line = format!("{:>6}  {time}  {:<16}  {}", entry.seq, entry.kind, entry.work);
    let end = if entry.truncated { "\nolder entries were deleted" } else { "" };
    format!("{}\n        {}{end}", line.trim_end(), entry.content).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Definition, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.toml");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn a_definition_is_read_from_toml() {
        let definition = read_text(
            "name = \"summary\"\nbehaviour = \"chain\"\nmodel = \"noop\"\n\
             phases = [\"action\", \"yield\"]\ncycles_max = 3\n",
        )
        .unwrap();
        assert_eq!(definition.name, "summary");
        assert_eq!(definition.phases, ["action", "yield"]);
        assert_eq!(definition.cycles_max, 3);
    }

    #[test]
    fn what_is_shown_of_a_definition_can_be_applied() {
        let definition = Definition {
            name: "summary".to_owned(),
            instructions: "be brief\nand \"exact\"".to_owned(),
            phases: vec!["action".to_owned(), "yield".to_owned()],
            cycles_max: 3,
            ..Definition::default()
        };
        let shown = DefinitionVersion {
            definition: Some(definition.clone()),
            ..DefinitionVersion::default()
        };
        assert_eq!(read_text(&version(&shown)).unwrap(), definition);
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line() {
        let failure = read_text("name = \"summary\"\n\nmodle = \"noop\"\n").unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        let text = failure.to_string();
        assert!(text.contains("summary.toml, line 3") && text.contains("`modle`"), "{text}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_line() {
        let failure = read_text("name = \"summary\"\ncycles_max = \"many\"\n").unwrap_err();
        let text = failure.to_string();
        assert!(text.contains("line 2") && text.contains("cycles_max"), "{text}");
    }

    #[test]
    fn what_is_no_toml_is_named_with_its_line() {
        let failure = read_text("name = \"summary\"\nthis is no TOML\n").unwrap_err();
        assert!(failure.to_string().contains("line 2"), "{failure}");
    }
}
