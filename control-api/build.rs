//! Generates messages and services from `proto/` without protoc.

const SOURCES: [&str; 2] = ["lamina/control/v1/storage_control.proto", "lamina/control/v1/leader.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(SOURCES)?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
