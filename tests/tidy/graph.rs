//! The direction of dependencies and what is built in, as cargo sees them on this platform. Dev-dependencies are free.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;

use crate::files::root;

/// Which of our crates each may use. A crate that is missing here fails the test, so that its place is thought about.
const LAYERS: [(&str, &[&str]); 14] = [
    ("domain", &[]),
    ("net", &["domain"]),
    ("proto", &["domain"]),
    ("telemetry", &["domain"]),
    ("model", &["domain", "telemetry"]),
    ("tool", &["domain"]),
    ("cluster", &["domain", "net", "proto", "telemetry"]),
    ("store", &["domain", "net", "proto", "telemetry"]),
    ("agent", &["cluster", "domain", "model", "net", "proto", "store", "telemetry", "tool"]),
    ("scheduler", &["cluster", "domain", "net", "proto", "store", "telemetry"]),
    ("client", &["domain", "net", "proto", "telemetry"]),
    (
        "node",
        &["agent", "cluster", "domain", "model", "net", "proto", "store", "telemetry", "tool"],
    ),
    ("control", &["cluster", "domain", "net", "proto", "scheduler", "store", "telemetry"]),
    ("cli", &["client", "control", "domain", "net", "node", "proto", "store", "telemetry"]),
];

/// Libraries that are the affair of some crates only.
const RESERVED: [(&str, &[&str]); 19] = [
    ("ractor_cluster", &["cluster"]),
    ("ractor", &["agent", "cluster", "scheduler"]),
    ("libsql", &["store"]),
    ("rustls", &["net"]),
    // `cluster` names the type of the stream that `net` hands to it.
    ("tokio-rustls", &["cluster", "net"]),
    ("rcgen", &["net"]),
    ("x509-parser", &["net"]),
    ("socket2", &["net"]),
    ("hyper-util", &["net"]),
    ("rustls-native-certs", &["net"]),
    ("hyper", &["store"]),
    ("tonic", &["client", "control", "net", "proto", "store"]),
    ("tonic-health", &["control"]),
    ("tonic-reflection", &["control"]),
    ("axum", &["telemetry"]),
    ("opentelemetry", &["telemetry"]),
    ("tracing-opentelemetry", &["telemetry"]),
    ("clap", &["cli"]),
    ("anyhow", &["cli"]),
];

/// All that `domain` needs: nothing that has a clock, a socket, a file, a thread or randomness.
const PURE: [&str; 5] = ["blake3", "bytes", "serde", "serde_json", "thiserror"];

/// Other implementations of what aws-lc-rs and tokio do here.
const UNWANTED: [&str; 6] = ["ring", "openssl-sys", "native-tls", "mbedtls", "async-std", "smol"];

/// Of each of our crates: its normal dependencies, by name.
static DIRECT: LazyLock<BTreeMap<String, BTreeSet<String>>> = LazyLock::new(|| {
    let output = cargo(&["metadata", "--format-version", "1", "--no-deps"]);
    let metadata: Value = serde_json::from_str(&output).expect("cargo writes JSON");
    let direct = array(&metadata["packages"]).map(|package| {
        let normal = array(&package["dependencies"]).filter(|dep| dep["kind"].is_null());
        let normal = normal.map(|dep| text(&dep["name"]).to_owned()).collect();
        (text(&package["name"]).to_owned(), normal)
    });
    direct.collect()
});

/// Everything that the shipped program is built from, with its features.
static SHIPPED: LazyLock<Vec<Package>> = LazyLock::new(|| tree("cli"));

/// Everything that `package` is built from.
fn tree(package: &str) -> Vec<Package> {
    let options = ["--edges", "normal,build", "--prefix", "none", "--format", "{p}|{f}"];
    let output = cargo(&[&["tree", "--package", package], &options[..]].concat());
    let packages: BTreeSet<Package> = output.lines().filter_map(Package::parse).collect();
    packages.into_iter().collect()
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    features: BTreeSet<String>,
}

impl Package {
    /// Reads `name v1.2.3|feature,feature`, with or without the mark of a repetition.
    fn parse(line: &str) -> Option<Self> {
        let (package, features) = line.split_once('|')?;
        let features = features.split([',', ' ']).filter(|f| !f.is_empty() && *f != "(*)");
        Some(Self {
            name: package.split(' ').next()?.to_owned(),
            features: features.map(str::to_owned).collect(),
        })
    }
}

/// Asks cargo, without the network: whoever built this test has all that it needs.
fn cargo(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(args).args(["--locked", "--offline"]);
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo writes text")
}

/// Our crates but the tests, which may use everything.
fn ours() -> impl Iterator<Item = (&'static str, &'static BTreeSet<String>)> {
    let ours = DIRECT.iter().filter(|(name, _)| *name != "tests");
    ours.map(|(name, needs)| (name.as_str(), needs))
}

fn shipped(name: &str) -> Vec<&'static Package> {
    SHIPPED.iter().filter(|package| package.name == name).collect()
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().expect("a list").iter()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

#[test]
fn our_crates_depend_on_each_other_in_one_direction_only() {
    let layers: BTreeMap<&str, &[&str]> = LAYERS.into_iter().collect();
    let known: BTreeSet<&str> = layers.keys().copied().collect();
    let mut wrong = Vec::new();
    for (name, needs) in ours() {
        let Some(allowed) = layers.get(name) else {
            wrong.push(format!("{name} has no place in the layers"));
            continue;
        };
        let ours = needs.iter().map(String::as_str).filter(|need| known.contains(need));
        let outside = ours.filter(|need| !allowed.contains(need));
        wrong.extend(outside.map(|need| format!("{name} may not use {need}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_layers_name_no_crate_that_is_gone() {
    let gone = LAYERS.iter().filter(|(name, _)| !DIRECT.contains_key(*name));
    let gone: Vec<_> = gone.map(|(name, _)| name).collect();
    assert!(gone.is_empty(), "{gone:?}");
}

#[test]
fn each_library_with_a_keeper_is_named_by_its_keepers_only() {
    let mut wrong = Vec::new();
    for (library, keepers) in RESERVED {
        let users = ours().filter(|(_, needs)| needs.contains(library));
        let others = users.filter(|(name, _)| !keepers.contains(name));
        wrong.extend(others.map(|(name, _)| format!("{name} may not use {library}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn domain_is_pure() {
    let needs = &DIRECT["domain"];
    let outside: Vec<_> = needs.iter().filter(|need| !PURE.contains(&need.as_str())).collect();
    assert!(outside.is_empty(), "domain may not use {outside:?}");
}

#[test]
fn there_is_one_tls_provider_and_one_runtime() {
    let found: Vec<_> = UNWANTED.iter().filter(|name| !shipped(name).is_empty()).collect();
    assert!(found.is_empty(), "the program contains {found:?}");
    assert!(!shipped("aws-lc-rs").is_empty(), "the TLS provider is missing");
}

#[test]
fn the_tls_of_tonic_is_off() {
    let tonic = shipped("tonic");
    assert!(!tonic.is_empty());
    for package in tonic {
        let tls: Vec<_> = package.features.iter().filter(|f| f.contains("tls")).collect();
        assert!(tls.is_empty(), "tonic has the features {tls:?}");
    }
}

#[test]
fn the_two_central_libraries_are_slim() {
    let check = |name: &str, unwanted: &[&str]| {
        let found = shipped(name);
        assert!(!found.is_empty(), "{name} is not used");
        let features = found.iter().flat_map(|package| &package.features);
        let wrong: Vec<_> = features.filter(|f| unwanted.contains(&f.as_str())).collect();
        assert!(wrong.is_empty(), "{name} has the features {wrong:?}");
    };
    check("libsql", &["default", "remote", "replication", "sync", "tls"]);
    check("ractor", &["default"]);
    check("ractor_cluster", &["default"]);
}

/// Only the tests let processes die at a place: what people build has none of it.
#[test]
fn the_shipped_program_has_no_fault_points() {
    let telemetry = shipped("telemetry");
    assert!(!telemetry.is_empty());
    assert!(telemetry.iter().all(|package| !package.features.contains("fault-points")));
    // Seen the same way, the tests have them.
    let tests = tree("tests");
    let mut telemetry = tests.iter().filter(|package| package.name == "telemetry");
    assert!(telemetry.any(|package| package.features.contains("fault-points")));
}
