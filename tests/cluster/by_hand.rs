//! A cluster without `dev`: certificates from `pki`, a config a process, each started by itself.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use tests::harness::{Child, Output, PATIENCE, Planted, eventually, free_address};

use crate::{HARBOUR, PROGRAM, result_of};

struct Plan<'a> {
    dir: &'a Path,
    api: SocketAddr,
}

impl Plan<'_> {
    /// Runs a `pki` command, which has to succeed.
    fn pki(&self, args: &[&str]) -> String {
        let dir = self.dir.join("pki");
        let output = PROGRAM.run(&[&["pki"], args, &["--dir", dir.to_str().unwrap()]].concat());
        assert_eq!(output.code, Some(0), "{output}");
        output.stdout.join("\n")
    }

    /// Issues the certificate of a process and writes its config, `rest` in the middle.
    fn role(&self, role: &str, name: &str, top: &str, rest: &str) -> Child {
        let pki = self.dir.join("pki");
        self.pki(&["issue", "--role", role, "--name", name]);
        let pki = pki.display();
        let config = format!(
            "{top}\n{rest}\n\
             [net]\ncertificate = \"{pki}/{name}.crt\"\nkey = \"{pki}/{name}.key\"\n\
             ca = \"{pki}/ca.crt\"\n\
             [telemetry]\nadmin = \"127.0.0.1:0\"\n"
        );
        let path = self.dir.join(format!("{name}.toml"));
        fs::write(&path, config).unwrap();
        let mut command = PROGRAM.command();
        command.args([role, "--stdin-guard", "--config"]).arg(path);
        Child::spawn(name, &mut command)
    }

    fn client(&self, args: &[&str]) -> Output {
        let mut command = PROGRAM.command();
        command.args(args).args(["--output", "json", "--api", &self.api.to_string()]);
        Output::of(command.arg("--credentials").arg(self.dir.join("ann")))
    }
}

#[test]
fn processes_that_are_started_one_by_one_form_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let [api, cluster, beat, store] = [(); 4].map(|()| free_address());
    let plan = Plan { dir: dir.path(), api };
    plan.pki(&["init"]);
    let ann = plan.dir.join("ann");
    let issue = ["issue", "--role", "client", "--name", "ann", "--out", ann.to_str().unwrap()];
    plan.pki(&issue);
    let certificate = ann.join("client.crt");
    let shown = PROGRAM.run(&["pki", "show", certificate.to_str().unwrap()]);
    let shown = shown.stdout.join("\n");
    assert!(shown.contains("spiffe://stagedoor.local/client/ann"), "{shown}");
    // A CA is not made over another one.
    let pki = plan.dir.join("pki");
    PROGRAM
        .run(&["pki", "init", "--dir", pki.to_str().unwrap()])
        .assert_error(2, &["ca.crt", "choose another"]);

    fs::write(plan.dir.join("cookie"), "a cookie of no meaning whatever\n").unwrap();
    let cookie = plan.dir.join("cookie");
    let member = |listen: &SocketAddr| {
        format!("[cluster]\nlisten = \"{listen}\"\ncookie = \"{}\"\n", cookie.display())
    };
    let stores = format!("[stores.main]\naddress = \"{store}\"\n");
    let data = plan.dir.join("data");
    let top = format!("listen = \"{store}\"\ndata_dir = \"{}\"", data.display());
    // In an order in which nobody finds whom it needs.
    let nodes = ["node-a", "node-b"].map(|name| {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let top = format!("name = \"{name}\"\ncontrols = [\"{cluster}\"]");
        plan.role("node", name, &top, &format!("{}{stores}", member(&any)))
    });
    let rest = format!(
        "{}{stores}[api]\nlisten = \"{api}\"\n[beat]\nlisten = \"{beat}\"\n[scheduler]\nshards = 4\n",
        member(&cluster)
    );
    let control = plan.role("control", "control-1", "name = \"control-1\"", &rest);
    let storing = plan.role("store", "store-1", &top, "");

    let planted = Planted::new(HARBOUR, 1_024);
    let args = ["submit", "--agent", "postchain", "--key", "k", "--text", &planted.text, "--watch"];
    let events = eventually(PATIENCE, "a work succeeds", || {
        let output = plan.client(&args);
        if output.code == Some(0) { Ok(output.documents()) } else { Err(output) }
    });
    planted.assert_found_in(result_of(&events)["result"]["text"].as_str().unwrap());
    for mut child in nodes.into_iter().chain([control, storing]) {
        child.signal(rustix::process::Signal::TERM);
        let status = child.wait(PATIENCE);
        assert_eq!(status.code(), Some(0), "{:?}", child.stderr());
    }
}
