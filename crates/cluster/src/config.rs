use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// How a process takes part in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where other members reach this one.
    pub listen: SocketAddr,
    /// What other members are told, `host:port`; without it the address that is listened on.
    pub advertise: Option<String>,
    /// The file with the cluster's cookie, at least 16 bytes of text. A second factor inside mutual TLS.
    pub cookie: PathBuf,
    /// How many may knock at once, and for how long.
    pub listener: net::ListenerConfig,
    /// One attempt to reach one address, milliseconds.
    pub dial_timeout_ms: u64,
    /// From a finished TLS handshake to a link that works, milliseconds.
    pub session_timeout_ms: u64,
    /// Silence after which a link is given up, milliseconds. A healthy peer is never silent for more than 5 s.
    pub silence_timeout_ms: u64,
    /// A link that was dialled on demand and carries nothing is closed after this, milliseconds.
    pub idle_timeout_ms: u64,
    /// The first pause after a failed dial, milliseconds; doubled up to the next, each with jitter.
    pub backoff_min_ms: u64,
    /// The longest pause between two dials, milliseconds.
    pub backoff_max_ms: u64,
    /// Envelopes to one peer that are queued or not acknowledged.
    pub window_envelopes: usize,
    /// The same in bytes.
    pub window_bytes: usize,
    /// Calls to one peer, and from one peer, that are not answered.
    pub calls_max: usize,
    /// What shutdown waits for what is on its way, milliseconds.
    pub drain_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7410)),
            advertise: None,
            cookie: PathBuf::new(),
            listener: net::ListenerConfig::default(),
            dial_timeout_ms: 5_000,
            session_timeout_ms: 5_000,
            silence_timeout_ms: 12_000,
            idle_timeout_ms: 60_000,
            backoff_min_ms: 50,
            backoff_max_ms: 2_000,
            window_envelopes: 1_024,
            window_bytes: 16 << 20,
            calls_max: 65_536,
            drain_timeout_ms: 1_000,
        }
    }
}

impl Config {
    pub(crate) fn session_timeout(&self) -> Duration {
        Duration::from_millis(self.session_timeout_ms)
    }

    pub(crate) fn silence_timeout(&self) -> Duration {
        Duration::from_millis(self.silence_timeout_ms)
    }

    pub(crate) fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms)
    }

    /// The pause before dial number `failures` + 1. `jitter` is in [0, 1): half of the pause depends on it, so that
    /// many who lost the same peer do not come back at the same moment.
    pub(crate) fn backoff(&self, failures: u32, jitter: f64) -> Duration {
        let doubled = self.backoff_min_ms.saturating_mul(1 << failures.saturating_sub(1).min(16));
        let longest = Duration::from_millis(doubled.min(self.backoff_max_ms));
        longest.mul_f64(0.5 + jitter / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_vary_by_half() {
        let config = Config::default();
        let check = |failures, jitter, expected_ms| {
            let pause = config.backoff(failures, jitter);
            assert_eq!(pause, Duration::from_millis(expected_ms), "{failures} {jitter}");
        };
        check(1, 0.0, 25);
        check(2, 0.0, 50);
        check(3, 0.5, 150);
        check(7, 0.0, 1_000);
        check(u32::MAX, 0.0, 1_000);
    }
}
