use std::net::SocketAddr;
use std::time::Duration;

/// How a node beats.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SenderConfig {
    /// Between two beats, milliseconds.
    pub period_ms: u64,
    /// One attempt to reach a listener, and the longest wait for an answer, milliseconds.
    pub timeout_ms: u64,
    /// The pause after a failed dial, milliseconds.
    pub redial_ms: u64,
}

impl Default for SenderConfig {
    fn default() -> Self {
        Self { period_ms: 500, timeout_ms: 2_000, redial_ms: 250 }
    }
}

impl SenderConfig {
    pub(super) fn period(&self) -> Duration {
        Duration::from_millis(self.period_ms.max(1))
    }

    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    pub(super) fn redial(&self) -> Duration {
        Duration::from_millis(self.redial_ms)
    }
}

/// Where control hears the beats.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenerConfig {
    pub listen: SocketAddr,
    /// How many may knock at once, and for how long.
    pub listener: net::ListenerConfig,
    /// Silence after which a connection is given up, milliseconds. Verdicts fall long before.
    pub silence_timeout_ms: u64,
}

impl Default for ListenerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7411)),
            listener: net::ListenerConfig::default(),
            silence_timeout_ms: 10_000,
        }
    }
}
