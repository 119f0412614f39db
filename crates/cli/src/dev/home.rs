//! The data directory of a cluster on this machine: who may use it, and what has to be in it before anything starts.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use domain::{ProcessName, Role};
use net::SpiffeId;
use net::pki::{self, Ca, Validity};

use crate::credentials::FOLDER;
use crate::exit::{Failure, chain};

/// What a data directory of this program looks like. A later program reads older ones, never the other way round.
const VERSION: u32 = 1;
const TRUST_DOMAIN: &str = "stagedoor.local";
/// A certificate that ends sooner is issued again at the start.
const RENEW_BEFORE: Duration = Duration::from_hours(14 * 24);
const LOCK: &str = "lock";
const COOKIE_BYTES: usize = 32;

/// A data directory that is ours as long as this lives.
#[derive(Debug)]
pub(crate) struct Home {
    dir: PathBuf,
    _lock: File,
}

impl Home {
    /// Takes the directory, and makes in it what is missing.
    pub(crate) fn open(dir: &Path) -> Result<Self, Failure> {
        // Before anything is touched.
        Self::check(dir)?;
        make_dir(dir)?;
        let dir = dir.canonicalize().map_err(|error| broken("find", dir, error))?;
        let lock = lock(&dir)?;
        let home = Self { dir, _lock: lock };
        // First of all: with it the folder is ours, however soon this process ends.
        write(&home.path("version"), format!("{VERSION}\n").as_bytes(), 0o600)?;
        for folder in ["ca", "certs", "config", "logs", "store", FOLDER] {
            make_dir(&home.path(folder))?;
        }
        home.make_cookie()?;
        Ok(home)
    }

    /// Whether the directory could be taken. Writes nothing.
    pub(crate) fn check(dir: &Path) -> Result<(), Failure> {
        check_version(dir)?;
        match File::open(dir.join(LOCK)) {
            Ok(mut file) => take_lock(&mut file, dir),
            // Nobody has it, or it shows in the next step.
            Err(_) => Ok(()),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The folder that clients use.
    pub(crate) fn credentials(&self) -> PathBuf {
        self.path(FOLDER)
    }

    pub(crate) fn log(&self, process: &str) -> PathBuf {
        self.path("logs").join(format!("{process}.log"))
    }

    pub(crate) fn config(&self, process: &str) -> PathBuf {
        self.path("config").join(format!("{process}.toml"))
    }

    /// The certificate of a process and its key.
    pub(crate) fn certificate(&self, process: &str) -> (PathBuf, PathBuf) {
        let file = |ending| self.path("certs").join(format!("{process}.{ending}"));
        (file("crt"), file("key"))
    }

    pub(crate) fn write_config(&self, process: &str, config: &str) -> Result<(), Failure> {
        write(&self.config(process), config.as_bytes(), 0o600)
    }

    /// Certificates for these processes and for clients, as far as there are none that last.
    pub(crate) fn certify<'a>(
        &self,
        processes: impl Iterator<Item = (Role, &'a str)>,
    ) -> Result<(), Failure> {
        let ca = self.ca()?;
        for (role, name) in processes {
            issue(&ca, role, name, &self.path("certs"), name)?;
        }
        let credentials = self.credentials();
        issue(&ca, Role::Client, "dev", &credentials, "client")?;
        write(&credentials.join("ca.crt"), ca.certificate_pem().as_bytes(), 0o644)
    }

    /// Tells clients where the API is.
    pub(crate) fn write_api(&self, addresses: &str) -> Result<(), Failure> {
        write(&self.credentials().join("api"), format!("{addresses}\n").as_bytes(), 0o644)
    }

    /// Writes a file of the directory whole or not at all.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        write(&self.path(name), bytes, 0o600)
    }

    fn ca(&self) -> Result<Ca, Failure> {
        let dir = self.path("ca");
        let ca = match dir.join("ca.crt").exists() {
            true => Ca::load(&dir),
            false => {
                let trust_domain = TRUST_DOMAIN.parse().expect("the name is a constant and valid");
                pki::init(&dir, &trust_domain)
            }
        };
        ca.map_err(|error| Failure::other(chain(&error)))
    }

    fn make_cookie(&self) -> Result<(), Failure> {
        let path = self.path("cookie");
        match path.exists() {
            true => Ok(()),
            false => {
                let bytes: [u8; COOKIE_BYTES] = rand::random();
                let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                write(&path, text.as_bytes(), 0o600)
            }
        }
    }
}

fn issue(ca: &Ca, role: Role, name: &str, dir: &Path, stem: &str) -> Result<(), Failure> {
    let certificate = dir.join(format!("{stem}.crt"));
    if lasts(&certificate) && dir.join(format!("{stem}.key")).exists() {
        return Ok(());
    }
    let name: ProcessName = name.parse().map_err(Failure::other)?;
    let id = SpiffeId { trust_domain: ca.trust_domain().clone(), role, name };
    let issued = ca.issue(&id, Validity::default()).and_then(|issued| issued.write(dir, stem));
    issued.map(drop).map_err(|error| Failure::other(chain(&error)))
}

fn lasts(certificate: &Path) -> bool {
    let until = SystemTime::now() + RENEW_BEFORE;
    pki::show(certificate).is_ok_and(|info| until < info.not_after)
}

fn check_version(dir: &Path) -> Result<(), Failure> {
    let path = dir.join("version");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return check_empty(dir),
        // Whatever else is wrong with the directory shows in the next step, with a better text.
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(()),
        Err(error) => return Err(broken("read", &path, error)),
    };
    let refuse = |why: String| {
        Err(Failure::usage(format!("data directory {} cannot be used", dir.display()))
            .why(why)
            .remedy("use the program that made it, or choose another with --data-dir"))
    };
    match text.trim().parse::<u32>() {
        Ok(version) if version <= VERSION => Ok(()),
        Ok(version) => {
            refuse(format!("it is of version {version}, and this program knows up to {VERSION}"))
        }
        Err(_) => refuse(format!("{} is no number", path.display())),
    }
}

/// Somebody else's folder is not to be filled with ours.
fn check_empty(dir: &Path) -> Result<(), Failure> {
    // A folder that is missing is made, and one that cannot be read shows in the next step.
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    let foreign = entries.flatten().map(|entry| entry.file_name()).find(|name| name != LOCK);
    match foreign {
        None => Ok(()),
        Some(name) => {
            Err(Failure::usage(format!("data directory {} cannot be used", dir.display()))
                .why(format!("it has no file `version`, and holds {}", name.display()))
                .remedy("choose an empty or a new folder with --data-dir"))
        }
    }
}

/// One cluster a directory. The lock goes with the process, however that ends.
fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| broken("open", &path, error))?;
    take_lock(&mut file, dir)?;
    let pid = std::process::id().to_string();
    let written =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(pid.as_bytes()));
    written.map_err(|error| broken("write", &path, error))?;
    Ok(file)
}

fn take_lock(file: &mut File, dir: &Path) -> Result<(), Failure> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The one who holds it wrote its pid; without it the refusal is as good.
            _ = file.read_to_string(&mut pid);
            Err(Failure::other(format!("data directory {} is in use", dir.display()))
                .why(format!("process {} runs a cluster in it", pid.trim()))
                .remedy("stop that one, or choose another with --data-dir"))
        }
        Err(TryLockError::Error(error)) => Err(broken("lock", &dir.join(LOCK), error)),
    }
}

/// For its owner only: keys are in it.
fn make_dir(path: &Path) -> Result<(), Failure> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| broken("make", path, error))
}

/// Whole or not at all, over what was there.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Failure> {
    let temporary = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    let written = options.open(&temporary).and_then(|mut file| file.write_all(bytes));
    let written = written.and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| broken("write", path, error))
}

fn broken(action: &str, path: &Path, error: std::io::Error) -> Failure {
    Failure::usage(format!("cannot {action} {}", path.display()))
        .why(error)
        .remedy("choose another folder with --data-dir")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::exit::Exit;

    #[test]
    fn a_second_cluster_in_one_directory_is_refused_with_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = Home::open(dir.path()).unwrap();
        let failure = Home::open(dir.path()).unwrap_err();
        let pid = format!("process {} ", std::process::id());
        assert!(failure.to_string().contains(&pid), "{failure}");
        drop(first);
        Home::open(dir.path()).unwrap();
    }

    #[test]
    fn a_directory_of_a_newer_version_is_refused_and_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("version"), "2\n").unwrap();
        let failure = Home::open(dir.path()).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        let text = failure.to_string();
        assert!(text.contains("version 2") && text.contains("--data-dir"), "{text}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_of_somebody_else_is_refused_and_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        let failure = Home::open(dir.path()).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        let text = failure.to_string();
        assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        assert!(text.contains("letter.txt") && text.contains("--data-dir"), "{text}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn certificates_and_cookie_outlive_a_restart() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("deep/dev");
        let read = || {
            let home = Home::open(&dir).unwrap();
            home.certify([(Role::Node, "node-1")].into_iter()).unwrap();
            let names = ["ca/ca.crt", "certs/node-1.crt", "credentials/client.crt", "cookie"];
            names.map(|name| fs::read_to_string(home.path(name)).unwrap())
        };
        assert_eq!(read(), read());
    }

    #[test]
    fn secrets_are_for_their_owner_only() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("dev");
        let home = Home::open(&dir).unwrap();
        home.certify([(Role::Node, "node-1")].into_iter()).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir), 0o700);
        for name in ["cookie", "ca/ca.key", "certs/node-1.key", "credentials/client.key"] {
            assert_eq!(mode(home.path(name)), 0o600, "{name}");
        }
    }

    #[test]
    fn a_certificate_that_ends_soon_is_issued_again() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        home.certify(std::iter::empty()).unwrap();
        let ca = Ca::load(&home.path("ca")).unwrap();
        let id = "spiffe://stagedoor.local/client/dev".parse().unwrap();
        ca.issue(&id, Validity::days(1)).unwrap().write(&home.credentials(), "client").unwrap();
        home.certify(std::iter::empty()).unwrap();
        assert!(lasts(&home.credentials().join("client.crt")));
    }
}
