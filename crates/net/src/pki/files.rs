//! Files that hold keys: readable by their owner from the first moment, and never half written.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::Error;

const DIR_MODE: u32 = 0o700;

pub(crate) fn read(action: &'static str, path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::File { action, path: path.into(), source })
}

/// Makes the folder if it is missing. One that exists keeps its rights: it is not ours.
pub(super) fn create_dir(dir: &Path) -> Result<(), Error> {
    let created = DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir);
    created.map_err(|source| Error::File { action: "create the folder", path: dir.into(), source })
}

/// Writes a file that must not exist yet.
pub(super) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    create_and_fill(path, bytes, mode).map_err(|source| {
        let path = path.into();
        if source.kind() == io::ErrorKind::AlreadyExists {
            return Error::Exists { path };
        }
        Error::File { action: "write", path, source }
    })
}

/// Writes a file beside its place and then moves it there.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = Path::new(&beside);
    let moved = create_and_fill(beside, bytes, mode).and_then(|()| fs::rename(beside, path));
    moved.and_then(|()| sync_parent(path)).map_err(|source| {
        // If it cannot be removed either, the first error is the one to tell.
        _ = fs::remove_file(beside);
        Error::File { action: "write", path: path.into(), source }
    })
}

fn create_and_fill(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        Some(_) | None => Ok(()),
    }
}
