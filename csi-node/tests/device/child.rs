//! Processes that the tests start, talk to, stop and kill: the holder, and servers of a device over a file.
//!
//! They are this very test program, told by the environment what to be. One that loses its parent ends: its standard
//! input closes.

use super::targets::FileVolume;
use lamina_csi_node::device::{self, DeviceKind, DeviceSpec};
use lamina_csi_node::holder::{Holder, HolderClient};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

pub(crate) const HOLDER: &str = "holder";
pub(crate) const ATTACH: &str = "attach";
pub(crate) const ATTACH_WITHOUT_HOLDER: &str = "attach without holder";
pub(crate) const RESUME: &str = "resume";

const ROLE: &str = "LAMINA_TEST_ROLE";
const VOLUME: &str = "LAMINA_TEST_VOLUME";
const DIRECTORY: &str = "LAMINA_TEST_DIRECTORY";

/// What the child does; the directory has all its files under fixed names.
pub(crate) fn main() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let role = std::env::var(ROLE).unwrap();
    if role == HOLDER { hold(&directory) } else { serve(&role, &directory) }
}

fn hold(directory: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let socket = directory.join("holder.sock");
    std::thread::spawn(|| {
        let _ = std::io::stdin().lines().count();
        std::process::exit(0);
    });
    runtime.block_on(Holder::new().serve_at(&socket)).unwrap();
}

fn serve(role: &str, directory: &Path) {
    let holder = || HolderClient::connect(&directory.join("holder.sock")).unwrap();
    let spec = DeviceSpec {
        volume: std::env::var(VOLUME).unwrap(),
        directory: directory.join("fuse"),
        target: Arc::new(FileVolume::open(&directory.join("bytes"))),
        on_superseded: Arc::new(|| std::process::exit(3)),
    };
    let device = match role {
        ATTACH => device::attach(DeviceKind::Auto, spec, Some(&holder())),
        ATTACH_WITHOUT_HOLDER => device::attach(DeviceKind::Auto, spec, None),
        RESUME => device::resume(DeviceKind::Auto, spec, &holder()),
        other => panic!("no such role: {other}"),
    };
    let device = device.unwrap();
    println!("\n{}", device.path().display());
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "detach" => device.detach().unwrap(),
            other => panic!("no such command: {other}"),
        }
        println!("done");
    }
    std::process::exit(0);
}

/// A child; killed when dropped.
pub(crate) struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    pub(crate) fn start(role: &str, volume: &str, directory: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process", "--ignored", "--nocapture"])
            .env(ROLE, role)
            .env(VOLUME, volume)
            .env(DIRECTORY, directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    fn wait_for(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let mut line = String::new();
        while self.out.read_line(&mut line).unwrap() > 0 {
            if wanted(line.trim()) {
                return line.trim().to_owned();
            }
            line.clear();
        }
        panic!("the child process ended without the word that was waited for");
    }

    /// Wait until it serves its device.
    pub(crate) fn device_path(&mut self) -> PathBuf {
        self.wait_for(|line| line.starts_with("/dev/")).into()
    }

    pub(crate) fn say(&mut self, command: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{command}").unwrap();
        self.wait_for(|line| line == "done");
    }

    /// SIGKILL, and wait until the process is no more.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGSTOP, and wait until no thread of it runs.
    pub(crate) fn stop(&self) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        assert!(status.stopped());
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
