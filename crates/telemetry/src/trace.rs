//! A trace goes from process to process as one string, the W3C `traceparent`.
//!
//! Knows nothing of gRPC metadata or frames; whoever has an envelope puts the string into it.

use std::sync::atomic::{AtomicBool, Ordering};

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// Whether spans are exported. Most processes export none, and the question is asked for every message.
static ENABLED: AtomicBool = AtomicBool::new(false);

pub(crate) fn enable() {
    ENABLED.store(true, Ordering::Relaxed);
}

pub(crate) fn disable() {
    ENABLED.store(false, Ordering::Relaxed);
}

/// The current span as a `traceparent`, for whoever continues this trace elsewhere. `None` where nothing is exported
/// or the trace is not sampled.
pub fn current_traceparent() -> Option<String> {
    if !ENABLED.load(Ordering::Relaxed) {
        return None;
    }
    let context = tracing::Span::current().context();
    let span = context.span();
    let span = span.span_context();
    if !span.is_valid() || !span.is_sampled() {
        return None;
    }
    Some(format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8()))
}

/// Makes `span` a child of the remote span that `traceparent` names; call it before the span is entered. Text that is
/// no `traceparent` changes nothing: it comes from outside, and a broken trace must not break the work.
pub fn set_parent(span: &tracing::Span, traceparent: Option<&str>) {
    if !ENABLED.load(Ordering::Relaxed) {
        return;
    }
    let Some(traceparent) = traceparent else { return };
    let context = TraceContextPropagator::new().extract(&Carrier(traceparent));
    if !context.span().span_context().is_valid() {
        return;
    }
    // Fails for a span that is filtered out or entered already: then it stays where it is.
    let _ = span.set_parent(context);
}

/// A `traceparent` as the one header of a message.
struct Carrier<'a>(&'a str);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACEPARENT).then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_exporter_nothing_is_carried() {
        let span = tracing::info_span!("turn");
        set_parent(&span, Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
        assert_eq!(span.in_scope(current_traceparent), None);
    }
}
