//! Makes `proto/src/gen` from `proto/stagedoor`, without protoc.

use std::path::Path;

use anyhow::Context;
use prost::Message;

/// Every `.proto` file, relative to the folder `proto`.
const FILES: [&str; 7] = [
    "stagedoor/v1/agent.proto",
    "stagedoor/v1/cluster.proto",
    "stagedoor/v1/registry.proto",
    "stagedoor/v1/work.proto",
    "stagedoor/journal/v1/journal.proto",
    "stagedoor/link/v1/link.proto",
    "stagedoor/link/v1/store.proto",
];

/// Compiles the files below `proto` into `out`: messages, services, the JSON forms of the API, and the descriptors
/// that reflection serves.
///
/// # Errors
/// A file that does not compile, named with its line; a folder that cannot be written.
pub fn generate(proto: &Path, out: &Path) -> anyhow::Result<()> {
    let descriptors = protox::compile(FILES, [proto]).context("cannot compile the .proto files")?;
    let bytes = descriptors.encode_to_vec();
    std::fs::write(out.join("descriptors.bin"), &bytes)?;
    let mut prost = tonic_prost_build::Config::new();
    prost.bytes(["."]);
    tonic_prost_build::configure()
        .out_dir(out)
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        .build_transport(false)
        .compile_fds_with_config(descriptors, prost)
        .context("cannot generate the messages")?;
    pbjson_build::Builder::new()
        .register_descriptors(&bytes)?
        .out_dir(out)
        .build(&[".stagedoor.v1"])
        .context("cannot generate the JSON forms")
}
