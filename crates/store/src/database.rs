//! The names of databases. A name becomes a file name, so nothing else is ever one.

use std::fmt;
use std::str::FromStr;

use domain::ShardId;

use crate::Error;

/// One database of a store: `control`, or `shard-17`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Database {
    Control,
    Shard(ShardId),
}

impl Database {
    pub(crate) fn file_name(self) -> String {
        format!("{self}.db")
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Shard(shard) => write!(f, "shard-{shard}"),
        }
    }
}

impl FromStr for Database {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "control" {
            return Ok(Self::Control);
        }
        let shard =
            text.strip_prefix("shard-").and_then(|number| number.parse().ok()).map(Self::Shard);
        // One database has one name: `shard-07` would be another name of the same file on no file system but ours.
        shard.filter(|shard| shard.to_string() == text).ok_or_else(|| {
            let shown: String = text.chars().take(80).collect();
            Error::invalid(format!(
                "database name {shown:?} is not valid: `control` or `shard-<number>` is allowed"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_control_and_shards_are_names() {
        let check = |text: &str, valid: bool| {
            let parsed = text.parse::<Database>();
            assert_eq!(
                parsed.as_ref().ok().map(ToString::to_string),
                valid.then(|| text.to_owned())
            );
        };
        check("control", true);
        check("shard-0", true);
        check("shard-4294967295", true);
        check("shard-4294967296", false);
        check("shard-07", false);
        check("shard-+7", false);
        check("shard--7", false);
        check("shard-1/../../etc/passwd", false);
        check("../shard-1", false);
        check("shard-1\0", false);
        check("Control", false);
        check("", false);
    }
}
