//! The contenders that are not Lamina: the raw file, qemu-nbd and nbdkit's file plugin, each over a file of its own.

use crate::contender::Contender;
use crate::load::Target;
use crate::process::Program;
use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// What ratios are taken to.
pub const QEMU: &str = "qemu-nbd";
/// The raw file.
pub const RAW: &str = "raw O_DIRECT";

/// All of them, over files of this size in the folder.
///
/// # Errors
/// A program is not there or does not start; the space is not there.
pub fn start(folder: &Path, bytes: u64) -> Result<Vec<Contender>> {
    Ok(vec![raw(folder, bytes)?, qemu(folder, bytes)?, nbdkit(folder, bytes)?])
}

fn file(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes)
        .with_context(|| format!("{bytes} bytes in {}", path.display()))?;
    Ok(path)
}

fn raw(folder: &Path, bytes: u64) -> Result<Contender> {
    let target = Target::Raw(file(folder, "raw.img", bytes)?);
    Ok(Contender { name: RAW, note: "its CPU is its client's".into(), target, programs: vec![] })
}

fn qemu(folder: &Path, bytes: u64) -> Result<Contender> {
    let image = file(folder, "qemu.img", bytes)?;
    let socket = folder.join("qemu.sock");
    let start = |aio: &str| {
        let mut command = Command::new("qemu-nbd");
        command.args(["--cache=none", &format!("--aio={aio}"), "--format=raw", "--persistent", "--shared=8"]);
        command.arg(format!("--socket={}", socket.display())).arg(&image);
        let program = Program::start(&format!("qemu-nbd-{aio}"), folder, command)?;
        program.wait_for_socket(&socket).map(|()| program)
    };
    let (program, aio) = match start("io_uring") {
        Ok(program) => (program, "io_uring"),
        Err(why) => (start("native").context(why)?, "native, io_uring refused"),
    };
    let note = format!("--cache=none --aio={aio}");
    Ok(Contender { name: QEMU, note, target: Target::Nbd(socket), programs: vec![Arc::new(program)] })
}

fn nbdkit(folder: &Path, bytes: u64) -> Result<Contender> {
    let image = file(folder, "nbdkit.img", bytes)?;
    let socket = folder.join("nbdkit.sock");
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket).arg("file").arg(&image);
    let program = Program::start("nbdkit", folder, command)?;
    program.wait_for_socket(&socket)?;
    let note = "buffered: answers from the page cache".to_owned();
    Ok(Contender { name: "nbdkit file", note, target: Target::Nbd(socket), programs: vec![Arc::new(program)] })
}
