//! W3C trace context in gRPC metadata. Envelopes carry the same text in a field of their own.

use tonic::metadata::MetadataMap;

const TRACEPARENT: &str = "traceparent";

/// Puts `traceparent` into the metadata of a request, if there is one.
pub fn inject(metadata: &mut MetadataMap, traceparent: Option<&str>) {
    if let Some(value) = traceparent.and_then(|text| text.parse().ok()) {
        metadata.insert(TRACEPARENT, value);
    }
}

/// The `traceparent` of a request. Anything that is not text, or too long to be one, is ignored.
pub fn extract(metadata: &MetadataMap) -> Option<&str> {
    const LEN_MAX: usize = 64;
    let text = metadata.get(TRACEPARENT)?.to_str().ok()?;
    (text.len() <= LEN_MAX).then_some(text)
}
