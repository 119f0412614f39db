//! One more node for a running cluster, started by itself with a config of its own.

use std::fs;
use std::path::PathBuf;

use net::pki::Validity;
use toml::{Table, Value};

use super::{Child, Dev, Metrics, free_address};

/// What is special about it.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    pub name: String,
    /// The phases it offers.
    pub phases: Vec<String>,
    /// Another cookie than the cluster's.
    pub cookie: Option<String>,
}

impl NodeOptions {
    /// A node like all others, which offers these phases.
    pub fn new(name: &str, phases: &[&str]) -> Self {
        let phases = phases.iter().map(|phase| (*phase).to_owned()).collect();
        Self { name: name.to_owned(), phases, cookie: None }
    }
}

/// The running node.
#[derive(Debug)]
pub struct Node {
    child: Child,
    admin: std::net::SocketAddr,
}

impl Node {
    /// Starts it; it joins by itself.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(dev: &Dev, options: &NodeOptions) -> Self {
        let admin = free_address();
        let mut config = table([
            ("name", text(&options.name)),
            ("zone", text("local")),
            ("controls", Value::Array(vec![text(&dev.control_address("cluster"))])),
            ("telemetry", Value::Table(table([("admin", text(&admin.to_string()))]))),
        ]);
        config.insert("stores".to_owned(), dev.config("node-1")["stores"].clone());
        config.insert("cluster".to_owned(), cluster(dev, options));
        config.insert("net".to_owned(), identity(dev, &options.name));
        let offer = options.phases.iter().map(|phase| text(phase)).collect();
        let phases = table([("offer", Value::Array(offer)), ("modality", text("text"))]);
        config.insert("phases".to_owned(), Value::Table(phases));
        let path = dev.scratch().join(format!("{}.toml", options.name));
        fs::write(&path, config.to_string()).expect("a folder to write to");
        let mut command = dev.program().command();
        command.arg("node").arg("--config").arg(path).arg("--stdin-guard");
        Self { child: Child::spawn(&options.name, &mut command), admin }
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// # Errors
    /// It does not answer.
    pub fn metrics(&self) -> std::io::Result<Metrics> {
        Metrics::read(self.admin)
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.child.stderr().join("\n")
    }
}

fn cluster(dev: &Dev, options: &NodeOptions) -> Value {
    let cookie = match &options.cookie {
        Some(cookie) => {
            let path = dev.scratch().join(format!("{}.cookie", options.name));
            fs::write(&path, cookie).expect("a folder to write to");
            path
        }
        None => dev.dir().join("cookie"),
    };
    Value::Table(table([("listen", text("127.0.0.1:0")), ("cookie", path(cookie))]))
}

fn identity(dev: &Dev, name: &str) -> Value {
    let id = format!("spiffe://stagedoor.local/node/{name}").parse().expect("a SPIFFE id");
    let issued = dev.ca().issue(&id, Validity::default()).expect("a certificate");
    let written = issued.write(dev.scratch(), name).expect("a folder to write to");
    Value::Table(table([
        ("certificate", path(written.certificate)),
        ("key", path(written.key)),
        ("ca", path(dev.dir().join("ca/ca.crt"))),
    ]))
}

fn path(path: PathBuf) -> Value {
    text(path.to_str().expect("a path in UTF-8"))
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn table<const N: usize>(entries: [(&str, Value); N]) -> Table {
    entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
