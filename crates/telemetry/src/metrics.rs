//! Counters, gauges and histograms of this process, in the default registry of the `prometheus` crate.
//!
//! Asking for a name again gives the same metric, so a caller keeps its metrics in a `LazyLock` and two callers may
//! share one. Labels are never identifiers of works, agents or callers: their number has no bound.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{Counter, HistogramOpts, Opts, TextEncoder};

pub use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

/// From a local call to one that waits for a deadline.
pub const LATENCY_BUCKETS_SECONDS: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0,
];

pub fn counter(name: &str, help: &str) -> IntCounter {
    registered(name, || IntCounter::new(name, help))
}

pub fn counter_vec(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(name, || IntCounterVec::new(Opts::new(name, help), labels))
}

pub fn gauge(name: &str, help: &str) -> IntGauge {
    registered(name, || IntGauge::new(name, help))
}

pub fn gauge_vec(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(name, || IntGaugeVec::new(Opts::new(name, help), labels))
}

pub fn histogram(name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    registered(name, || Histogram::with_opts(options))
}

pub fn histogram_vec(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    registered(name, || HistogramVec::new(options, labels))
}

/// Every metric of this process as Prometheus text, what the process uses measured now.
pub fn text() -> Result<String, prometheus::Error> {
    PROCESS.measure();
    TextEncoder::new().encode_to_string(&prometheus::gather())
}

/// The metric of this name, made at the first call.
///
/// # Panics
/// Where the name is no metric name or is taken by another kind: both are constants in our code, and the first use
/// shows the mistake.
fn registered<M>(name: &str, make: impl FnOnce() -> prometheus::Result<M>) -> M
where
    M: Collector + Clone + 'static,
{
    static KNOWN: Mutex<BTreeMap<String, Box<dyn Any + Send>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(metric) = known.get(name) {
        let metric = metric.downcast_ref::<M>();
        return metric.expect("a metric name stands for one kind of metric").clone();
    }
    let metric = make().expect("a metric has a valid name and valid labels");
    prometheus::register(Box::new(metric.clone())).expect("the name is not taken");
    known.insert(name.to_owned(), Box::new(metric.clone()));
    metric
}

/// What the process uses, measured when someone asks.
struct Process {
    resident_bytes: IntGauge,
    /// Locked while it is raised: two scrapes at once must not both add the same seconds.
    cpu_seconds: Mutex<Counter>,
}

static PROCESS: LazyLock<Process> = LazyLock::new(|| {
    const CPU: &str = "process_cpu_seconds_total";
    Process {
        resident_bytes: gauge("process_resident_memory_bytes", "Memory of the process in RAM."),
        cpu_seconds: Mutex::new(registered(CPU, || {
            Counter::new(CPU, "Processor time that the process used.")
        })),
    }
});

impl Process {
    fn measure(&self) {
        if let Some(bytes) = resident_bytes() {
            self.resident_bytes.set(bytes);
        }
        let counter = self.cpu_seconds.lock().unwrap_or_else(PoisonError::into_inner);
        counter.inc_by((cpu_seconds() - counter.get()).max(0.0));
    }
}

/// `None` where there is no procfs.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1_024)
}

fn cpu_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_is_the_same_metric() {
        counter("test_shared_total", "Shared.").inc();
        counter("test_shared_total", "Shared.").inc_by(2);
        assert_eq!(counter("test_shared_total", "Shared.").get(), 3);
        let by_kind = || counter_vec("test_kinds_total", "By kind.", &["kind"]);
        by_kind().with_label_values(&["a"]).inc();
        assert_eq!(by_kind().with_label_values(&["a"]).get(), 1);
    }

    #[test]
    fn the_text_holds_every_metric_and_what_the_process_uses() {
        gauge("test_level", "A level.").set(-4);
        histogram("test_seconds", "A time.", LATENCY_BUCKETS_SECONDS).observe(0.3);
        let text = text().unwrap();
        assert!(text.contains("\ntest_level -4\n"), "{text}");
        assert!(text.contains("test_seconds_bucket{le=\"0.5\"} 1\n"), "{text}");
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse::<f64>().ok()).unwrap()
        };
        assert!(1e6 < value("process_resident_memory_bytes "));
        assert!(0.0 < value("process_cpu_seconds_total "));
    }

    #[test]
    fn processor_time_only_grows() {
        let first = cpu_seconds();
        (0..3).for_each(|_| drop(text().unwrap()));
        assert!(first <= cpu_seconds());
    }
}
