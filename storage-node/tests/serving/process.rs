//! One server process; killed when the test ends, however it ends.

use rustix::process::{Pid, Resource, Rlimit, Signal};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Anything of a healthy process happens within this time, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const PROGRAM: &str = env!("CARGO_BIN_EXE_lamina-storage-node");

pub(crate) struct Process {
    child: Child,
    device: PathBuf,
    pub(crate) block: SocketAddr,
    pub(crate) control: SocketAddr,
    metrics: SocketAddr,
}

impl Process {
    /// Starts a server on free ports, with one file of 128 MiB.
    pub(crate) async fn start(dir: &Path, name: &str) -> Self {
        Self::with_devices(&[format!("{},size=128MiB", dir.join(format!("{name}.img")).display())]).await
    }

    /// Starts a server on free ports with these devices, and waits until each was looked at.
    pub(crate) async fn with_devices(devices: &[String]) -> Self {
        let mut command = Command::new("sh");
        // Writes above RLIMIT_FSIZE then fail as on a broken disk, and do not end the process.
        command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", PROGRAM, "serve"]);
        for device in devices {
            command.arg("--device").arg(device);
        }
        let first = devices.first().and_then(|device| device.split(',').next()).unwrap_or_default();
        let process = Self::spawn(command, PathBuf::from(first));
        process.until_metric("state=\"").await;
        process.until(|text| !text.contains("state=\"opening\"")).await;
        process
    }

    /// Another process on the device and the addresses of one that ended.
    pub(crate) fn again(&self) -> Self {
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--device").arg(&self.device);
        Self::spawn_at(command, self.device.clone(), [self.block, self.control])
    }

    /// Starts a server that takes its devices from the object named after this node.
    pub(crate) fn of_node(node: &str, kubeconfig: &Path) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--kubernetes", "--node", node]).env("KUBECONFIG", kubeconfig);
        Self::spawn(command, PathBuf::new())
    }

    fn spawn(command: Command, device: PathBuf) -> Self {
        Self::spawn_at(command, device, [SocketAddr::from(([127, 0, 0, 1], 0)); 2])
    }

    fn spawn_at(mut command: Command, device: PathBuf, [block, control]: [SocketAddr; 2]) -> Self {
        let mut child = command
            .args(["--cluster", "00000000000000000000000000000001", "--log-format", "json"])
            .args(["--listen", &block.to_string(), "--control", &control.to_string(), "--metrics", "127.0.0.1:0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let listening = lines.by_ref().map(Result::unwrap).find(|line| line.contains("listening"));
        let line: serde_json::Value = serde_json::from_str(&listening.expect("it listens")).unwrap();
        let at = |what: &str| line["fields"][what].as_str().unwrap().parse().unwrap();
        let (block, control, metrics) = (at("block"), at("control"), at("metrics"));
        // Its log goes on as the test's.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
        Self { child, device, block, control, metrics }
    }

    pub(crate) fn device(&self) -> PathBuf {
        self.device.clone()
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    /// SIGKILL, and until its devices and ports are free.
    pub(crate) fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// From now on every write to a file fails, or none.
    pub(crate) fn fail_writes(&self, fail: bool) {
        let limit = Rlimit { current: fail.then_some(0), maximum: None };
        rustix::process::prlimit(Some(Pid::from_child(&self.child)), Resource::Fsize, limit).unwrap();
    }

    pub(crate) fn is_running(&self) -> bool {
        let pid = Pid::from_child(&self.child);
        std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).is_ok_and(|stat| !stat.contains(") Z "))
    }

    /// The exit status, within the time of any event.
    pub(crate) async fn exited(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("it does not end");
    }

    /// Status and body of a path of the metrics listener.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.metrics).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer)
    }

    /// The sum of all series that start so.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        let series = text.lines().filter(|line| line.starts_with(name));
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub(crate) async fn until_metric(&self, part: &str) {
        self.until(|text| text.contains(part)).await;
    }

    async fn until(&self, holds: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        while !holds(&self.get("/metrics").await.1) {
            assert!(begun.elapsed() < PATIENCE, "it does not come to that");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The report of `inspect` with an output; it must succeed.
pub(crate) fn inspect(devices: &[&Path], output: &Path) -> String {
    let done = Command::new(PROGRAM).arg("inspect").arg("--output").arg(output).args(devices).output().unwrap();
    assert!(
        done.status.success(),
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}
