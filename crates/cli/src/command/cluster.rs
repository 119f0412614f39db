//! `status`, `nodes`, `shards`, `capabilities` and `why`.

use domain::{AgentId, ProcessName, WorkId};
use proto::v1::{
    CordonRequest, DrainRequest, ExplainRequest, ExplainResponse, FindRequest, FindResponse, Node,
    ReleaseShardRequest, Shard, StatusResponse, UncordonRequest,
};

use crate::args::{CapabilitiesArgs, Kind, NodeArgs, OnlyConnection, ReleaseArgs, WhyArgs};
use crate::credentials::connect;
use crate::exit::{Exit, Failure};
use crate::output;

/// `status`.
pub(crate) async fn status(args: OnlyConnection) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    output::print(args.connection.output, &client.status().await?, summary)?;
    Ok(Exit::Ok)
}

/// `nodes`.
pub(crate) async fn nodes(args: OnlyConnection) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let answer = client.nodes().await?;
    output::print(args.connection.output, &answer, |answer| node_table(&answer.nodes))?;
    Ok(Exit::Ok)
}

/// `shards`.
pub(crate) async fn shards(args: OnlyConnection) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let answer = client.shards().await?;
    output::print(args.connection.output, &answer, |answer| shard_table(&answer.shards))?;
    Ok(Exit::Ok)
}

/// `capabilities`.
pub(crate) async fn capabilities(args: CapabilitiesArgs) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let request = FindRequest {
        name: args.name,
        version_min: i32::from(args.version_min),
        attributes: args.attribute.into_iter().collect(),
    };
    output::print(args.connection.output, &client.find(request).await?, capability_table)?;
    Ok(Exit::Ok)
}

/// `why`.
pub(crate) async fn why(args: WhyArgs) -> Result<Exit, Failure> {
    let kind = check(args.kind, &args.id)?;
    let client = connect(&args.connection)?;
    let request = ExplainRequest { kind: kind.to_owned(), id: args.id };
    let list = match args.kind {
        Kind::Work => "stagedoor work list",
        Kind::Agent => "stagedoor agents",
        Kind::Shard => "stagedoor shards",
        Kind::Node => NODES,
        Kind::Leader => "stagedoor status",
    };
    let answer = client.explain(request).await.map_err(|error| Failure::of_one(error, list))?;
    output::print(args.connection.output, &answer, explanation)?;
    Ok(Exit::Ok)
}

/// `cordon`.
pub(crate) async fn cordon(args: NodeArgs) -> Result<Exit, Failure> {
    let request = CordonRequest { name: args.name.to_string() };
    let answer = connect(&args.connection)?.cordon(request).await;
    let answer = answer.map_err(|error| Failure::of_one(error, NODES))?;
    output::print(args.connection.output, &answer, |answer| node_table(answer.node.as_slice()))?;
    Ok(Exit::Ok)
}

/// `uncordon`.
pub(crate) async fn uncordon(args: NodeArgs) -> Result<Exit, Failure> {
    let request = UncordonRequest { name: args.name.to_string() };
    let answer = connect(&args.connection)?.uncordon(request).await;
    let answer = answer.map_err(|error| Failure::of_one(error, NODES))?;
    output::print(args.connection.output, &answer, |answer| node_table(answer.node.as_slice()))?;
    Ok(Exit::Ok)
}

/// `drain`.
pub(crate) async fn drain(args: NodeArgs) -> Result<Exit, Failure> {
    let request = DrainRequest { name: args.name.to_string() };
    let answer = connect(&args.connection)?.drain(request).await;
    let answer = answer.map_err(|error| Failure::of_one(error, NODES))?;
    output::print(args.connection.output, &answer, |answer| node_table(answer.node.as_slice()))?;
    Ok(Exit::Ok)
}

/// `release`.
pub(crate) async fn release(args: ReleaseArgs) -> Result<Exit, Failure> {
    let request = ReleaseShardRequest { id: args.shard.into() };
    let answer = connect(&args.connection)?.release_shard(request).await;
    let answer = answer.map_err(|error| Failure::of_one(error, "stagedoor shards"))?;
    output::print(args.connection.output, &answer, |answer| shard_table(answer.shard.as_slice()))?;
    Ok(Exit::Ok)
}

/// Where to look for what there is.
const NODES: &str = "stagedoor nodes";

/// The kind as the API names it, once the id is one of that kind.
fn check(kind: Kind, id: &str) -> Result<&'static str, Failure> {
    let (name, checked) = match kind {
        Kind::Work => ("work", id.parse::<WorkId>().map(drop)),
        Kind::Agent => ("agent", id.parse::<AgentId>().map(drop)),
        Kind::Node => ("node", id.parse::<ProcessName>().map(drop)),
        Kind::Leader => ("leader", id.parse::<ProcessName>().map(drop)),
        Kind::Shard => match id.parse::<u16>() {
            Ok(_) => ("shard", Ok(())),
            Err(_) => {
                return Err(Failure::usage(format!("shard {id:?} is not valid"))
                    .why("a number is allowed")
                    .remedy("`stagedoor shards` shows which there are"));
            }
        },
    };
    match checked {
        Ok(()) => Ok(name),
        Err(error) => Err(Failure::usage(error).remedy("correct the id")),
    }
}

fn summary(status: &StatusResponse) -> String {
    let leader = status.leader.clone().unwrap_or_default();
    let store = status.store.clone().unwrap_or_default();
    let alive = status.nodes.iter().filter(|node| node.state == "alive").count();
    let open = status.shards.iter().filter(|shard| shard.state == "open").count();
    let reached = if store.reachable { "reachable" } else { "not reachable" };
    let leader = match leader.name.as_str() {
        "" => "none".to_owned(),
        name => format!("{name} (term {})", leader.term),
    };
    format!(
        "cluster  {} (version {})\nleader   {leader}\nstore    {} at {}, {}, durability {}, {reached}\n\
         nodes    {alive} of {} alive\nshards   {open} of {} open\n\n{}",
        status.cluster_id,
        status.version,
        store.name,
        store.url,
        store.engine,
        store.durability,
        status.nodes.len(),
        status.shards.len(),
        node_table(&status.nodes),
    )
}

fn node_table(nodes: &[Node]) -> String {
    let rows = nodes.iter().map(|node| {
        [
            node.name.clone(),
            match node.admission.as_str() {
                "" => node.state.clone(),
                admission => format!("{}, {admission}", node.state),
            },
            node.reason.clone(),
            node.zone.clone(),
            node.address.clone(),
            node.hot_agents.to_string(),
            node.shards.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        ]
    });
    let headings = ["NODE", "STATE", "REASON", "ZONE", "ADDRESS", "HOT AGENTS", "SHARDS"];
    output::table(headings, rows.collect())
}

fn shard_table(shards: &[Shard]) -> String {
    let rows = shards.iter().map(|shard| {
        [
            shard.id.to_string(),
            shard.state.clone(),
            shard.node.clone(),
            shard.epoch.to_string(),
            shard.reason.clone(),
            shard.location.clone(),
        ]
    });
    output::table(["SHARD", "STATE", "NODE", "EPOCH", "REASON", "LOCATION"], rows.collect())
}

fn capability_table(answer: &FindResponse) -> String {
    let rows = answer.capabilities.iter().map(|capability| {
        let mut attributes: Vec<_> =
            capability.attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
        attributes.sort();
        [
            capability.name.clone(),
            capability.version.to_string(),
            capability.node.clone(),
            format!("{}/{}", capability.load, capability.capacity),
            attributes.join(" "),
        ]
    });
    output::table(["CAPABILITY", "VERSION", "NODE", "LOAD", "ATTRIBUTES"], rows.collect())
}

fn explanation(answer: &ExplainResponse) -> String {
    let rows = answer.transitions.iter().map(|change| {
        let from = if change.from.is_empty() { "-" } else { &change.from };
        [
            output::time(change.time.as_ref()),
            change.subject.clone(),
            format!("{from} -> {}", change.to),
            change.reason.clone(),
            change.node.clone(),
            change.epoch.to_string(),
            change.cause.clone(),
        ]
    });
    let headings = ["TIME", "WHAT", "CHANGE", "REASON", "NODE", "EPOCH", "CAUSE"];
    let table = output::table(headings, rows.collect());
    let end =
        if answer.truncated { "\nolder transitions were deleted, or are too many" } else { "" };
    match answer.placement.is_empty() {
        true => format!("{table}{end}"),
        false => format!("{table}{end}\n\n{}", answer.placement.join("\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_checked_as_one_of_its_kind() {
        let valid = |kind, id| assert!(check(kind, id).is_ok(), "{kind:?} {id}");
        let refused = |kind, id| {
            let failure = check(kind, id).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.to_string().contains(id), "{failure}");
        };
        valid(Kind::Work, "w-0-0ff-1");
        valid(Kind::Agent, "default/postchain/demo");
        valid(Kind::Shard, "7");
        valid(Kind::Node, "node-1");
        refused(Kind::Work, "7");
        refused(Kind::Agent, "demo");
        refused(Kind::Shard, "shard-7");
        refused(Kind::Node, "Node 1");
    }
}
