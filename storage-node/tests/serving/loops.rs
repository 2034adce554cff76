//! A loop device of a test; skipped where none can be made.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; gone with this value.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
}

impl Loop {
    /// `None` where it cannot be made, which is said.
    pub(crate) fn of(test: &str, file: &Path, sector_bytes: u32) -> Option<Self> {
        std::fs::File::create(file).unwrap().set_len(128 << 20).unwrap();
        let sector = sector_bytes.to_string();
        let made = Command::new("losetup").args(["--find", "--show", "--sector-size", &sector]).arg(file).output();
        match made {
            Ok(out) if out.status.success() => {
                Some(Self { path: PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()) })
            }
            Ok(out) => {
                println!("skipped: {test}: no loop device: {}", String::from_utf8_lossy(&out.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: {test}: no losetup: {error}");
                None
            }
        }
    }
}

impl Loop {
    /// Its file has another size now: the kernel takes it over.
    pub(crate) fn resize(&self, file: &Path, bytes: u64) {
        std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(bytes).unwrap();
        assert!(Command::new("losetup").arg("--set-capacity").arg(&self.path).status().unwrap().success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
