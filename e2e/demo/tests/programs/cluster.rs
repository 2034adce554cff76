//! Operators and storage servers as children of the test.

use rustix::process::{Pid, Signal};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Anything happens within this time, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Where the programs are.
pub(crate) struct Programs(PathBuf);

impl Programs {
    pub(crate) fn command(&self, name: &str) -> Command {
        Command::new(self.0.join(name))
    }
}

pub(crate) fn programs() -> Programs {
    Programs(lamina_demo::images::programs_dir())
}

/// `None` where they are not built, which is said.
pub(crate) fn programs_or_skip(test: &str) -> Option<Programs> {
    let programs = programs();
    let missing = ["lamina-operator", "lamina-storage-node"].into_iter().find(|name| !programs.0.join(name).is_file());
    match missing {
        None => Some(programs),
        Some(name) => {
            println!("skipped: {test}: {name} is not built");
            None
        }
    }
}

/// A child with its words in a file; it ends with this value.
pub(crate) struct Running {
    child: Child,
    words: PathBuf,
}

impl Running {
    fn start(mut command: Command, words: PathBuf) -> Self {
        let file = std::fs::File::create(&words).unwrap();
        let command = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Self { child: command.spawn().unwrap(), words }
    }

    fn wait_for<T>(&mut self, what: &str, found: impl Fn(&str) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            let text = std::fs::read_to_string(&self.words).unwrap();
            if let Some(found) = found(&text) {
                return found;
            }
            assert!(self.child.try_wait().unwrap().is_none() && begun.elapsed() < PATIENCE, "no {what}: {text}");
            // sleep: a program tells nobody when it has come so far.
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Its words, if it has ended well.
    pub(crate) fn has_done(&mut self) -> Option<String> {
        let well = self.child.try_wait().unwrap().is_some_and(|status| status.success());
        well.then(|| std::fs::read_to_string(&self.words).unwrap())
    }

    pub(crate) fn signal(&self, name: &str) {
        let signal = match name {
            "STOP" => Signal::STOP,
            "CONT" => Signal::CONT,
            "TERM" => Signal::TERM,
            _ => panic!("{name}"),
        };
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Its exit status, once it has ended.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            let text = || std::fs::read_to_string(&self.words).unwrap();
            assert!(begun.elapsed() < PATIENCE, "it does not end: {}", text());
            // sleep: a program tells nobody when it has come so far.
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Storage servers that serve, each with a file.
pub(crate) struct Cluster {
    folder: TempDir,
    pub(crate) servers: Vec<Running>,
    controls: Vec<String>,
    metrics: Vec<String>,
}

/// What the directory says that the cluster is called; chosen here, so that servers can be there first.
const CLUSTER: &str = "000000000000000000000000000000c1";

impl Cluster {
    pub(crate) fn start(servers: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = Self { folder, servers: Vec::new(), controls: Vec::new(), metrics: Vec::new() };
        (0..servers).for_each(|number| cluster.add(number));
        cluster
    }

    fn add(&mut self, number: usize) {
        let device = format!("{},size=128MiB", self.folder.path().join(format!("{number}.img")).display());
        let mut command = programs().command("lamina-storage-node");
        command.args(["serve", "--log-format", "json", "--cluster", CLUSTER, "--device", &device]);
        command.args(["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
        let mut server = Running::start(command, self.folder.path().join(format!("server-{number}.log")));
        let (control, metrics) = server.wait_for("addresses", |text| {
            let line: Value = serde_json::from_str(text.lines().find(|line| line.contains("listening"))?).ok()?;
            let at = |what: &str| Some(line["fields"][what].as_str()?.to_owned());
            Some((at("control")?, at("metrics")?))
        });
        server.wait_for("its device", |text| text.contains("device opened").then_some(()));
        self.servers.push(server);
        self.controls.push(control);
        self.metrics.push(metrics);
    }

    /// An empty folder for an operator's objects of this cluster.
    pub(crate) fn objects(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("cluster"), format!("{CLUSTER}\n")).unwrap();
        folder
    }

    /// Copies that lie on all servers, as they say themselves.
    pub(crate) fn copies(&self) -> usize {
        self.metrics
            .iter()
            .map(|at| page(at).lines().filter(|l| l.starts_with("lamina_storage_copy_state{")).count())
            .sum()
    }

    pub(crate) fn end(&mut self) {
        self.servers.clear();
    }
}

fn page(at: &str) -> String {
    let mut stream = TcpStream::connect(at).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// An operator over a directory.
pub(crate) struct Operator {
    running: Running,
    address: String,
}

impl Operator {
    /// Starts it; with a step, it dies there.
    pub(crate) fn start(objects: &Path, die_at: Option<&str>) -> Self {
        let mut command = programs().command("lamina-operator");
        command.args(["serve", "--listen", "127.0.0.1:0", "--directory"]).arg(objects);
        command.envs(die_at.map(|step| ("LAMINA_DIE_AT", step)));
        let mut running = Running::start(command, objects.with_extension("operator.log"));
        let address = running.wait_for("address", |text| {
            let line = text.lines().find_map(|line| line.strip_prefix("lamina-operator listens on "))?;
            let (address, cluster) = line.split_once(", cluster ")?;
            assert_eq!(cluster, CLUSTER);
            Some(address.to_owned())
        });
        Self { running, address }
    }

    /// Makes the servers and a policy of two copies on two groups known.
    pub(crate) fn know(self, cluster: &Cluster) -> Self {
        for (number, control) in cluster.controls.iter().enumerate() {
            self.ask(&["server", "add", &format!("s{number}"), "--control", control]).unwrap();
        }
        self.ask(&["policy", "create", "two", "--copies", "2", "--stripe-width", "2", "--page-size", "64Ki"]).unwrap();
        self
    }

    pub(crate) fn create_volume(&self) -> Result<Value, String> {
        self.ask(&["volume", "create", "v", "--size", "16Mi", "--policy", "two"])
    }

    fn asking(&self, words: &[&str]) -> Command {
        let mut command = programs().command("lamina-operator");
        command.args(words).args(["--operator", &self.address, "-o", "json"]).stdin(Stdio::null());
        command
    }

    /// Asks as a person does; what it says, or why not.
    pub(crate) fn ask(&self, words: &[&str]) -> Result<Value, String> {
        let done = self.asking(words).output().unwrap();
        match done.status.success() {
            true => Ok(serde_json::from_slice(&done.stdout).unwrap_or_default()),
            false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
        }
    }

    /// Asks, and does not wait for the answer.
    pub(crate) fn begin(&self, words: &[&str]) -> Running {
        let words_file = self.running.words.with_extension(format!("{}.log", words[1]));
        Running::start(self.asking(words), words_file)
    }

    /// Whether it has ended.
    pub(crate) fn is_gone(&mut self) -> bool {
        self.running.child.try_wait().unwrap().is_some()
    }

    /// As [`Self::until`], but it may end before.
    pub(crate) fn until_gone_or(&mut self, what: &str, so: impl Fn(Option<&Value>) -> bool) {
        let begun = Instant::now();
        while !self.is_gone() && !self.ask(&["volume", "show", "v"]).is_ok_and(|volume| so(Some(&volume))) {
            assert!(begun.elapsed() < PATIENCE, "no sign of {what}");
            // sleep: a program tells nobody when it has come so far.
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits until the volume is so; `None` = there is none.
    pub(crate) fn until(&self, what: &str, so: impl Fn(Option<&Value>) -> bool) -> Option<Value> {
        let begun = Instant::now();
        loop {
            let volume = self.ask(&["volume", "show", "v"]);
            if !volume.as_ref().is_err_and(|why| !why.contains("there is no Volume")) && so(volume.as_ref().ok()) {
                return volume.ok();
            }
            assert!(begun.elapsed() < PATIENCE, "no sign of {what}: {volume:#?}");
            // sleep: a program tells nobody when it has come so far.
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The exit status of one that is told to die.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.running.ended()
    }

    pub(crate) fn stop(mut self) {
        self.running.signal("TERM");
        assert_eq!(self.running.ended(), Some(0));
    }
}
