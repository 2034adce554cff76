//! The filesystems' own programs.
//!
//! They are looked for in fixed directories: in images with busybox its namesakes come first in PATH.

use super::HostError;
use lamina_csi_api::capability::Filesystem;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const DIRECTORIES: [&str; 5] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin"];
/// Of what a program printed, the last this many bytes are shown.
const SHOWN: usize = 600;

/// blkid: nothing was found.
const BLKID_NOTHING: i32 = 2;
/// A last group that is too small for its own tables stays unused: an ext4 may be smaller than its device by that,
/// bytes.
const EXT4_SLACK: u64 = 8 << 20;
/// e2fsck: from this bit on something is left uncorrected, or it could not work.
const E2FSCK_UNCORRECTED: i32 = 4;

fn find(program: &'static str) -> Result<PathBuf, HostError> {
    let paths = DIRECTORIES.iter().map(|directory| Path::new(directory).join(program));
    paths.into_iter().find(|path| path.is_file()).ok_or(HostError::Missing { program })
}

fn run(program: &'static str, arguments: &[&str], device: &Path) -> Result<Output, HostError> {
    let mut command = Command::new(find(program)?);
    command.args(arguments).arg(device).stdin(Stdio::null()).env("LC_ALL", "C");
    let started = std::time::Instant::now();
    let output = command.output().map_err(HostError::at("run a program on", device))?;
    tracing::info!(program, device = %device.display(), status = %output.status, took = ?started.elapsed(), "ran");
    Ok(output)
}

fn must_succeed(program: &'static str, arguments: &[&str], device: &Path) -> Result<(), HostError> {
    let output = run(program, arguments, device)?;
    if output.status.success() { Ok(()) } else { Err(failed(program, &output)) }
}

fn failed(program: &'static str, output: &Output) -> HostError {
    HostError::Program { program, status: output.status.to_string(), said: said(output) }
}

fn said(output: &Output) -> String {
    let text = [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat();
    let text = text.trim();
    let start = (text.len().saturating_sub(SHOWN)..=text.len()).find(|at| text.is_char_boundary(*at));
    text[start.unwrap_or(0)..].replace('\n', "; ")
}

/// What blkid finds by reading; `None` = nothing. Several signatures at once are an answer too: `ambivalent`.
pub(super) fn signature(device: &Path) -> Result<Option<String>, HostError> {
    let output = run("blkid", &["--probe", "--output", "export"], device)?;
    let found = String::from_utf8_lossy(&output.stdout);
    let tag = |name: &str| found.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
    match output.status.code() {
        Some(0) => Ok(Some(tag("TYPE").or_else(|| tag("PTTYPE")).unwrap_or_else(|| "unknown".to_owned()))),
        Some(BLKID_NOTHING) => Ok(None),
        Some(8) => Ok(Some("ambivalent".to_owned())),
        _ => Err(failed("blkid", &output)),
    }
}

/// Thin volumes have nothing to discard before their first filesystem.
pub(super) fn format(device: &Path, filesystem: Filesystem) -> Result<(), HostError> {
    match filesystem {
        Filesystem::Ext4 => must_succeed("mkfs.ext4", &["-F", "-q", "-m0", "-E", "nodiscard"], device),
        Filesystem::Xfs => must_succeed("mkfs.xfs", &["-f", "-q", "-K"], device),
    }
}

/// xfs recovers when it is mounted; ext4 too, but what its journal cannot mend is mended here or not at all.
pub(super) fn check(device: &Path, filesystem: Filesystem, size: u64) -> Result<(), HostError> {
    if filesystem != Filesystem::Ext4 {
        return Ok(());
    }
    e2fsck(device, "-p")?;
    if ext4_bytes(device)?.is_some_and(|bytes| bytes + EXT4_SLACK < size) {
        // resize2fs insists on a check that was not cut short.
        e2fsck(device, "-fp")?;
        must_succeed("resize2fs", &[], device)?;
    }
    Ok(())
}

fn e2fsck(device: &Path, how: &str) -> Result<(), HostError> {
    let output = run("e2fsck", &[how], device)?;
    match output.status.code() {
        Some(code) if code & !(E2FSCK_UNCORRECTED - 1) == 0 => Ok(()),
        Some(code) if code & E2FSCK_UNCORRECTED != 0 => {
            Err(HostError::NeedsRepair { program: "e2fsck", said: said(&output) })
        }
        _ => Err(failed("e2fsck", &output)),
    }
}

/// Bytes of an ext4 by its superblock (fields `s_magic`, `s_blocks_count`, `s_log_block_size` at 1024 bytes).
fn ext4_bytes(device: &Path) -> Result<Option<u64>, HostError> {
    let mut block = [0; 1024];
    let read = File::open(device).and_then(|file| file.read_exact_at(&mut block, 1024));
    read.map_err(HostError::at("read the superblock of", device))?;
    let number = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if block[56..58] != [0x53, 0xEF] {
        return Ok(None);
    }
    let wide = number(96) & 0x80 != 0;
    let blocks = u64::from(number(4)) | if wide { u64::from(number(0x150)) << 32 } else { 0 };
    Ok(blocks.checked_mul(1024 << number(24).min(6)))
}

/// Grow a mounted filesystem.
pub(super) fn grow(device: &Path, mounted: &Path, filesystem: Filesystem) -> Result<(), HostError> {
    match filesystem {
        Filesystem::Ext4 => must_succeed("resize2fs", &[], device),
        Filesystem::Xfs => must_succeed("xfs_growfs", &["-d"], mounted),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn device(directory: &tempfile::TempDir, size: u64) -> PathBuf {
        let path = directory.path().join("device");
        File::options().create(true).append(true).open(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn lacks(test: &str, programs: &[&'static str]) -> bool {
        let missing = programs.iter().find_map(|program| find(program).err());
        if let Some(missing) = &missing {
            eprintln!("skipped: {test}: {missing}");
        }
        missing.is_some()
    }

    #[test]
    fn a_filesystem_shows_its_signature_and_a_blank_device_none() {
        if lacks("signature", &["blkid", "mkfs.ext4", "mkfs.xfs"]) {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = device(&directory, 400 << 20);
        assert_eq!(signature(&path).unwrap(), None);
        format(&path, Filesystem::Ext4).unwrap();
        assert_eq!(signature(&path).unwrap().as_deref(), Some("ext4"));
        format(&path, Filesystem::Xfs).unwrap();
        assert_eq!(signature(&path).unwrap().as_deref(), Some("xfs"));
    }

    #[test]
    fn an_ext4_grows_with_its_device_before_it_is_mounted() {
        if lacks("ext4 growth", &["e2fsck", "mkfs.ext4", "resize2fs"]) {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = device(&directory, 64 << 20);
        format(&path, Filesystem::Ext4).unwrap();
        assert_eq!(ext4_bytes(&path).unwrap(), Some(64 << 20));
        check(&path, Filesystem::Ext4, 64 << 20).unwrap();
        assert_eq!(ext4_bytes(&path).unwrap(), Some(64 << 20));
        device(&directory, 128 << 20);
        check(&path, Filesystem::Ext4, 128 << 20).unwrap();
        assert_eq!(ext4_bytes(&path).unwrap(), Some(128 << 20));
    }

    #[test]
    fn an_ext4_beyond_its_own_repair_is_left_alone() {
        if lacks("ext4 repair", &["e2fsck", "mkfs.ext4"]) {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = device(&directory, 16 << 20);
        File::options().write(true).open(&path).unwrap().write_all_at(&[0xA5; 4096], 0).unwrap();
        let error = check(&path, Filesystem::Ext4, 16 << 20).unwrap_err();
        assert!(matches!(error, HostError::Program { .. } | HostError::NeedsRepair { .. }), "{error}");
    }
}
