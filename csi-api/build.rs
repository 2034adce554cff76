//! Generates messages and services from `proto/` without protoc, and for every message that holds credentials a `Debug` that
//! does not show them.
//!
//! Invariant: a field marked `csi_secret` in the .proto can not reach a log through `{:?}`. Mount flags may hold credentials
//! too (CSI says so), and upstream does not mark them: they are named here.

use std::fmt::Write as _;
use std::path::Path;

use protox::prost_reflect::{DescriptorPool, FieldDescriptor, MessageDescriptor};

const SOURCES: [&str; 8] = [
    "csi/v1/options.proto",
    "csi/v1/identity.proto",
    "csi/v1/volume.proto",
    "csi/v1/controller.proto",
    "csi/v1/node.proto",
    "csi/v1/group.proto",
    "csi/v1/snapshot_metadata.proto",
    "pluginregistration/registration.proto",
];

/// Not marked upstream, but CSI allows credentials in it.
const ALSO_SECRET: &str = "csi.v1.VolumeCapability.MountVolume.mount_flags";

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(SOURCES)?;

    let pool = compiler.descriptor_pool();
    let secretive = messages_with_secrets(&pool);
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("redacted_debug.rs"), debug_impls(&secretive)?)?;

    tonic_prost_build::configure()
        .generate_default_stubs(true)
        .skip_debug(secretive.iter().map(|message| format!(".{}", message.full_name())))
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

fn messages_with_secrets(pool: &DescriptorPool) -> Vec<MessageDescriptor> {
    pool.all_messages().filter(|message| message.fields().any(|field| is_secret(pool, &field))).collect()
}

fn is_secret(pool: &DescriptorPool, field: &FieldDescriptor) -> bool {
    let marked = pool
        .get_extension_by_name("csi.v1.csi_secret")
        .is_some_and(|mark| field.options().get_extension(&mark).as_bool() == Some(true));
    marked || field.full_name() == ALSO_SECRET
}

/// One `Debug` per message; of a secret field it prints the number of entries.
fn debug_impls(messages: &[MessageDescriptor]) -> Result<String, Failure> {
    let mut code = String::new();
    for message in messages {
        let name = message.name();
        writeln!(code, "impl ::core::fmt::Debug for {} {{", rust_path(message))?;
        writeln!(code, "fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {{")?;
        writeln!(code, "f.debug_struct({name:?})")?;
        for field in message.fields() {
            let field_name = field.name();
            if is_secret(message.parent_pool(), &field) {
                writeln!(code, ".field({field_name:?}, &super::redacted::Redacted(self.{field_name}.len()))")?;
            } else {
                writeln!(code, ".field({field_name:?}, &self.{field_name})")?;
            }
        }
        writeln!(code, ".finish() }} }}")?;
    }
    Ok(code)
}

/// prost puts nested messages into a module named after their parent; one level is all there is.
fn rust_path(message: &MessageDescriptor) -> String {
    match message.parent_message() {
        None => message.name().to_owned(),
        Some(parent) => format!("{}::{}", snake_case(parent.name()), message.name()),
    }
}

fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    for (at, letter) in name.chars().enumerate() {
        if letter.is_ascii_uppercase() && at > 0 {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}
