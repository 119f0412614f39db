//! How often the disk was told to sync, read where it happens: a library of a few lines of C stands before libc's in
//! this process and in all that it starts, and counts in a file that they share.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};

/// The file; set in a run that counts.
const COUNT: &str = "BENCH_SYNCS";
const SOURCE: &str = include_str!("syncs.c");

/// Runs this program again with the library loaded and answers how that ended. None: this is that run.
pub(super) fn counting() -> anyhow::Result<Option<ExitCode>> {
    if std::env::var_os(COUNT).is_some() {
        return Ok(None);
    }
    let folder = tempfile::tempdir()?;
    let library = library(folder.path())?;
    let count = folder.path().join("count");
    std::fs::write(&count, 0_u64.to_ne_bytes())?;
    let mut again = Command::new(std::env::current_exe()?);
    again.args(std::env::args_os().skip(1)).env(COUNT, count).env("LD_PRELOAD", library);
    let code = again.status()?.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(Some(code.into()))
}

fn library(folder: &Path) -> anyhow::Result<PathBuf> {
    let (source, library) = (folder.join("syncs.c"), folder.join("syncs.so"));
    std::fs::write(&source, SOURCE)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O2", "-o"]).args([&library, &source]).arg("-ldl");
    let status = compiler.status().context("a C compiler is needed to count syncs")?;
    ensure!(status.success(), "cc ended with {status}");
    Ok(library)
}

/// By all processes, since the bench began.
pub(crate) fn count() -> anyhow::Result<u64> {
    let path = std::env::var_os(COUNT).context("this run does not count syncs")?;
    let bytes = std::fs::read(path)?;
    Ok(u64::from_ne_bytes(bytes.as_slice().try_into()?))
}
