//! The floor: what any two processes cost between an NBD client and a disk, with nothing in them but copying.
//!
//! ```text
//! fio ─ NBD, unix socket ─► front (front.rs) ─ the same bytes, TCP on loopback ─► disk (disk.rs) ─ io_uring, O_DIRECT ─► file
//! ```
//! No copies, no generations, no checksums, no journal: what Lamina costs beyond this is its own, what this costs beyond
//! qemu-nbd is the second process and its sockets. Invariant: each process has one thread, sleeps when there is nothing
//! to do, and uses one system call where one is enough.

use crate::contender::Contender;
use crate::load::Target;
use crate::process::Program;
use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

mod disk;
mod front;

pub use disk::serve as serve_disk;
pub use front::serve as serve_front;

/// For people.
pub const FLOOR: &str = "floor: two processes";

/// Both processes, over a file of this size in the folder.
///
/// # Errors
/// One of them does not start; the space is not there.
pub fn start(folder: &Path, bytes: u64) -> Result<Contender> {
    let (image, socket) = (folder.join("floor.img"), folder.join("floor.sock"));
    let file = File::create(&image).with_context(|| image.display().to_string())?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes).with_context(|| image.display().to_string())?;
    let own = std::env::current_exe()?;
    let mut command = Command::new(&own);
    command.arg("floor-disk").arg(&image);
    let disk = Program::start("floor-disk", folder, command)?;
    let address = disk.wait_for("its address", |text| Some(text.trim().strip_prefix("listens on ")?.to_owned()))?;
    let mut command = Command::new(&own);
    command.arg("floor-front").arg(&socket).args([&address, &bytes.to_string()]);
    let front = Program::start("floor-front", folder, command)?;
    front.wait_for_socket(&socket)?;
    let note =
        "a front end and a disk process that only copy: not a product, but what two processes cost at least".into();
    Ok(Contender { name: FLOOR, note, target: Target::Nbd(socket), programs: vec![Arc::new(disk), Arc::new(front)] })
}
