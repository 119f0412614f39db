//! What a process counts, read from its admin port.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);

/// What an admin port answers, head and body.
///
/// # Errors
/// Nobody answers there.
pub(super) fn get(admin: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The metrics of one process at one moment.
#[derive(Clone, Debug)]
pub struct Metrics {
    lines: Vec<String>,
}

impl Metrics {
    /// # Errors
    /// Nobody answers there, or not with metrics.
    pub fn read(admin: SocketAddr) -> std::io::Result<Self> {
        let answer = get(admin, "/metrics")?;
        if !answer.starts_with("HTTP/1.1 200") {
            let first = answer.lines().next().unwrap_or_default();
            return Err(std::io::Error::other(format!("the answer of {admin} is {first:?}")));
        }
        Ok(Self { lines: answer.lines().map(str::to_owned).collect() })
    }

    /// The sum of all series of this name that have all these labels, given as `name="value"`.
    ///
    /// # Panics
    /// There is none: what is not counted is not 0.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.find(name, labels)
            .unwrap_or_else(|| panic!("no series {name} with {labels:?} is there"))
    }

    /// The same, if there is one.
    pub fn find(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let values = self.lines.iter().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (shown, value) = match rest.strip_prefix('{') {
                Some(rest) => rest.split_once("} ")?,
                None => ("", rest.strip_prefix(' ')?),
            };
            let has_all = labels.iter().all(|label| shown.split(',').any(|part| part == *label));
            has_all.then(|| value.trim().parse::<f64>().ok())?
        });
        values.reduce(|sum, value| sum + value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_labels() {
        let text = "# TYPE calls counter\ncalls{model=\"a\",task=\"x\"} 2\ncalls{model=\"a\",task=\"y\"} 3\n\
                    calls{model=\"b\",task=\"x\"} 4\ncalls_total 5\nup 1";
        let metrics = Metrics { lines: text.lines().map(str::to_owned).collect() };
        assert_eq!(metrics.sum("calls", &[]), 9.0);
        assert_eq!(metrics.sum("calls", &["model=\"a\""]), 5.0);
        assert_eq!(metrics.sum("calls", &["model=\"a\"", "task=\"x\""]), 2.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
    }

    #[test]
    #[should_panic(expected = "no series down with")]
    fn a_series_that_is_not_there_is_not_0() {
        let metrics = Metrics { lines: vec!["down_total 1".to_owned(), "up 0".to_owned()] };
        assert_eq!(metrics.find("up", &["model=\"a\""]), None);
        metrics.sum("down", &[]);
    }
}
