//! `store backup` and `store restore`.

use std::path::Path;

use proto::v1::{BackupRequest, BackupResponse};
use serde::Serialize;

use crate::args::{BackupArgs, Format};
use crate::credentials::connect;
use crate::exit::{Exit, Failure, chain};
use crate::output;
use crate::role::{self, StoreRole};

/// `store backup`.
pub(crate) async fn backup(args: BackupArgs) -> Result<Exit, Failure> {
    let client = connect(&args.connection)?;
    let answer = client.backup(BackupRequest { name: args.name }).await?;
    output::print(args.connection.output, &answer, |BackupResponse { name, databases }| {
        let count = databases.len();
        format!(
            "backup {name}: {count} databases, in the folder `backups` of the store\'s data directory"
        )
    })?;
    Ok(Exit::Ok)
}

#[derive(Serialize)]
struct Restored {
    name: String,
    databases: Vec<String>,
    /// The folder with what was there before.
    replaced: Option<String>,
    /// Databases that could not be read before they were replaced.
    unread: Vec<String>,
}

/// `store restore`.
pub(crate) fn restore(name: &str, config: &Path, format: Format) -> Result<Exit, Failure> {
    let config = role::load::<StoreRole>(config)?;
    let restored = ::store::restore(&config.data_dir, name);
    let restored = restored.map_err(|error| {
        Failure::other(chain(&error))
            .remedy("stop the store first; its folder `backups` shows which backups there are")
    })?;
    let restored = Restored {
        name: name.to_owned(),
        databases: restored.databases,
        replaced: restored.replaced.map(|folder| folder.display().to_string()),
        unread: restored.unread,
    };
    output::print(format, &restored, |restored| {
        let count = restored.databases.len();
        let kept = restored.replaced.as_ref();
        let kept = kept.map(|folder| format!("; what was there before is in {folder}"));
        let kept = kept.unwrap_or_default();
        let unread = match restored.unread.is_empty() {
            true => String::new(),
            false => format!("; not readable before were {}", restored.unread.join(", ")),
        };
        format!("restored {count} databases of {}{kept}{unread}", restored.name)
    })?;
    Ok(Exit::Ok)
}
