//! A data directory: used by one store at a time, and never by an older version than the one that wrote it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::Error;

/// Grows with a change that older versions must not touch.
const LAYOUT: u32 = 1;
const LOCK: &str = "lock";
const VERSION: &str = "version";
const BACKUPS: &str = "backups";
/// There while the files of a restore take the place of others.
const RESTORING: &str = "restoring";
const BACKUP_NAME_MAX: usize = 128;

/// Held for as long as any thread may write in it.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// The system lets go of the lock when this is closed, also when the process is killed.
    lock: Mutex<Option<File>>,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        fs::create_dir_all(path)
            .map_err(|error| Error::file("create data directory", path, error))?;
        let directory = Self::open_to_restore(path)?;
        if directory.file(RESTORING).exists() {
            let what = format!(
                "data directory {} is half restored: run `stagedoor store restore` again",
                path.display()
            );
            return Err(Error::invalid(what));
        }
        Ok(directory)
    }

    /// The same for a restore, which may have been cut off before.
    pub(crate) fn open_to_restore(path: &Path) -> Result<Self, Error> {
        let lock = lock(path)?;
        check_version(path)?;
        Ok(Self { path: path.to_owned(), lock: Mutex::new(Some(lock)) })
    }

    /// Lets another store in. Only when no thread writes any more.
    pub(crate) fn unlock(&self) {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes names of new files as durable as what is in them.
    pub(crate) fn flush_names(&self) -> Result<(), Error> {
        flush_directory(&self.path)
    }

    /// Every file in the folder of backups.
    pub(crate) fn backups(&self) -> Result<Vec<PathBuf>, Error> {
        let folder = self.path.join(BACKUPS);
        let failed = |error| Error::file("read", &folder, error);
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&folder).map_err(failed)?;
        let mut files = Vec::new();
        for entry in entries {
            files.push(entry.map_err(failed)?.path());
        }
        files.sort();
        Ok(files)
    }

    /// Puts the files of the folder `parts` in the place of all databases. Those are kept, in a folder of this name.
    pub(crate) fn replace(&self, parts: &Path, name: &str) -> Result<Option<PathBuf>, Error> {
        let mark = self.path.join(RESTORING);
        fs::write(&mark, name).map_err(|error| Error::file("write", &mark, error))?;
        flush_directory(&self.path)?;
        let kept = self.path.join(format!("replaced-{name}"));
        let before = databases(&self.path)?;
        if !before.is_empty() {
            fs::create_dir_all(&kept).map_err(|error| Error::file("create", &kept, error))?;
        }
        let moved = |from: PathBuf, folder: &Path| {
            let to = folder.join(from.file_name().unwrap_or_default());
            fs::rename(&from, &to).map_err(|error| Error::file("move to", to, error))
        };
        for file in &before {
            moved(file.clone(), &kept)?;
        }
        for file in databases(parts)? {
            moved(file, &self.path)?;
        }
        flush_directory(&self.path)?;
        fs::remove_dir_all(parts).map_err(|error| Error::file("remove", parts, error))?;
        fs::remove_file(&mark).map_err(|error| Error::file("remove", &mark, error))?;
        flush_directory(&self.path)?;
        Ok((!before.is_empty()).then_some(kept))
    }

    /// Where a backup of this name goes, and where it is made before it is whole.
    pub(crate) fn backup(&self, name: &str) -> Result<(PathBuf, PathBuf), Error> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let is_valid = !name.is_empty()
            && name.len() <= BACKUP_NAME_MAX
            && !name.starts_with('.')
            && name.bytes().all(allowed);
        if !is_valid {
            let shown: String = name.chars().take(80).collect();
            return Err(Error::invalid(format!(
                "backup name {shown:?} is not valid: 1 to 128 letters, digits, '-', '_' and '.' are allowed, \
                 no '.' first; it is put into the folder `backups` of the data directory"
            )));
        }
        let folder = self.path.join(BACKUPS);
        fs::create_dir_all(&folder).map_err(|error| Error::file("create", &folder, error))?;
        let target = folder.join(name);
        if target.exists() {
            return Err(Error::invalid(format!(
                "backup {name:?} exists already; choose another name"
            )));
        }
        Ok((target, folder.join(format!(".{name}.part"))))
    }
}

/// The database files of a folder, with what belongs to them.
fn databases(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |error| Error::file("read", folder, error);
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| ending.starts_with("db")) && path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

pub(crate) fn flush_directory(path: &Path) -> Result<(), Error> {
    let flushed = File::open(path).and_then(|folder| folder.sync_all());
    flushed.map_err(|error| Error::file("flush", path, error))
}

fn lock(directory: &Path) -> Result<File, Error> {
    let path = directory.join(LOCK);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = opened.map_err(|error| Error::file("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The holder may just be writing it: then the pid is not known, the refusal stands.
            _ = file.read_to_string(&mut pid);
            let pid = pid.trim().to_owned();
            return Err(Error::Locked { directory: directory.to_owned(), pid });
        }
        Err(TryLockError::Error(error)) => return Err(Error::file("lock", &path, error)),
    }
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|error| Error::file("write", &path, error))?;
    Ok(file)
}

fn check_version(directory: &Path) -> Result<(), Error> {
    let path = directory.join(VERSION);
    let found = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let written = fs::write(&path, format!("{LAYOUT}\n"));
            return written.map_err(|error| Error::file("write", &path, error));
        }
        Err(error) => return Err(Error::file("read", &path, error)),
    };
    let shown = directory.display();
    match found.trim().parse::<u32>() {
        Ok(found) if found <= LAYOUT => Ok(()),
        Ok(found) => Err(Error::NewerSchema {
            what: format!(
                "data directory {shown} has version {found}, this program knows {LAYOUT}"
            ),
        }),
        Err(_) => {
            Err(Error::Corrupt { what: format!("file {} of data directory {shown}", VERSION) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_store_on_the_same_directory_is_refused_with_the_pid_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = Directory::open(folder.path()).unwrap();
        let refused = Directory::open(folder.path()).unwrap_err();
        assert!(
            matches!(&refused, Error::Locked { pid, .. } if *pid == std::process::id().to_string())
        );
        drop(first);
        Directory::open(folder.path()).unwrap();
    }

    #[test]
    fn a_directory_of_a_newer_version_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        drop(Directory::open(folder.path()).unwrap());
        fs::write(folder.path().join(VERSION), "2\n").unwrap();
        let refused = Directory::open(folder.path()).unwrap_err();
        assert!(matches!(refused, Error::NewerSchema { .. }), "{refused}");
        assert!(refused.to_string().contains("newer version of stagedoor"), "{refused}");
    }

    #[test]
    fn a_backup_stays_in_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open(folder.path()).unwrap();
        for name in ["", "..", "../x", "/etc/passwd", "a/b", ".hidden", "a\0b", &"a".repeat(129)] {
            assert!(matches!(directory.backup(name), Err(Error::Invalid { .. })), "{name:?}");
        }
        let (target, _) = directory.backup("shard-1.2026-01-01.db").unwrap();
        assert!(target.starts_with(folder.path().join(BACKUPS)));
    }
}
