//! Lamina as processes: an operator over a directory, storage servers, and an export per volume, on loopback or in network
//! namespaces.
//!
//! Invariant: programs and commands are those that people use without Kubernetes (README); nothing is wired within this
//! process.

use crate::contender::Contender;
use crate::load::Target;
use crate::place::Place;
use crate::process::Program;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod server;

pub use server::Server;

/// Between two looks at a volume.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How the storage servers write data (R11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Once, where it belongs: the device keeps 4 KiB whole.
    InPlace,
    /// Through the journal first.
    Journal,
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// How data is written.
    pub mode: Mode,
    /// Bytes of each server's file.
    pub device_bytes: u64,
    /// Where the operator runs.
    pub operator: Place,
    /// Where each storage server runs; they are named a, b, c and so on.
    pub servers: Vec<Place>,
    /// Where the drivers run.
    pub driver: Place,
}

impl Shape {
    /// All on loopback.
    #[must_use]
    pub fn on_loopback(mode: Mode, device_bytes: u64, servers: usize) -> Self {
        let (operator, driver) = (Place::LOOPBACK, Place::LOOPBACK);
        Self { mode, device_bytes, operator, servers: vec![Place::LOOPBACK; servers], driver }
    }
}

/// An operator with its storage servers.
#[derive(Debug)]
pub struct Cluster {
    programs: PathBuf,
    folder: PathBuf,
    shape: Shape,
    id: String,
    leader: String,
    /// The storage servers.
    pub servers: Vec<Server>,
    operator: Arc<Program>,
}

/// A volume that is attached and exported on a unix socket.
#[derive(Debug)]
pub struct Export {
    /// Name of the volume.
    pub volume: String,
    /// Its size.
    pub bytes: u64,
    /// What a load goes to.
    pub target: Target,
    /// The driver's process.
    pub program: Arc<Program>,
}

impl Cluster {
    /// Starts it: the programs lie in `programs`, each server has a file in the folder. There are policies `one` and `two`,
    /// of so many copies.
    ///
    /// # Errors
    /// A program is not there or does not come up.
    pub fn start(programs: &Path, folder: &Path, shape: Shape) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut command = shape.operator.command(&programs.join("lamina-operator"));
        command.args(["serve", "--listen", &shape.operator.any_port().to_string(), "--directory"]);
        command.arg(folder.join("objects"));
        let operator = Program::start(&format!("operator, {:?}", shape.mode), folder, command)?;
        let (leader, id) = operator.wait_for("its address", |text| {
            let line = text.lines().find_map(|line| line.strip_prefix("lamina-operator listens on "))?;
            let (address, id) = line.split_once(", cluster ")?;
            Some((address.to_owned(), id.to_owned()))
        })?;
        let (programs, folder, operator) = (programs.to_owned(), folder.to_owned(), Arc::new(operator));
        let mut cluster = Self { programs, folder, shape, id, leader, servers: vec![], operator };
        for (name, place) in ('a'..='z').zip(cluster.shape.servers.clone()) {
            cluster.add_server(&name.to_string(), place)?;
        }
        for (policy, copies) in [("one", "1"), ("two", "2")] {
            cluster.ask(&["policy", "create", policy, "--copies", copies])?;
        }
        Ok(cluster)
    }

    fn add_server(&mut self, name: &str, place: Place) -> Result<()> {
        let mode = if self.shape.mode == Mode::InPlace { "atomic4k" } else { "journaled" };
        let start = server::Start {
            name,
            place,
            folder: &self.folder,
            program: &self.programs.join("lamina-storage-node"),
            cluster: &self.id,
            options: &format!("size={}B,{mode}", self.shape.device_bytes),
        };
        let server = Server::start(start)?;
        let control = server.control().context("it is up")?.to_string();
        self.servers.push(server);
        self.ask(&["server", "add", name, "--control", &control]).map(drop)
    }

    /// Asks the operator as a person does; what it says as JSON.
    ///
    /// # Errors
    /// What the operator refuses.
    pub fn ask(&self, words: &[&str]) -> Result<Value> {
        let mut command = self.shape.operator.command(&self.programs.join("lamina-operator"));
        let done = command.args(words).args(["--operator", &self.leader, "-o", "json"]).output()?;
        if !done.status.success() {
            bail!("lamina-operator {}: {}", words.join(" "), String::from_utf8_lossy(&done.stderr));
        }
        serde_json::from_slice(&done.stdout).with_context(|| format!("what lamina-operator {} says", words[0]))
    }

    /// The volume as the operator has it.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn volume(&self, name: &str) -> Result<Value> {
        self.ask(&["volume", "show", name])
    }

    /// Waits until the volume is so; gives it as it then is.
    ///
    /// # Errors
    /// It does not come to that within the time, with the volume as it is.
    pub fn until(&self, name: &str, what: &str, limit: Duration, so: impl Fn(&Value) -> bool) -> Result<Value> {
        let begun = Instant::now();
        loop {
            let volume = self.volume(name)?;
            if so(&volume) {
                return Ok(volume);
            }
            if begun.elapsed() > limit {
                bail!("{name} is not {what} after {limit:?}: {:#}", volume["status"]);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The id of a server, which the operator learns from it.
    ///
    /// # Errors
    /// The operator has not met it.
    pub fn id_of(&self, server: usize) -> Result<String> {
        let shown = self.ask(&["server", "show", self.servers[server].name()])?;
        Ok(shown["status"]["serverId"].as_str().context("a server id")?.to_owned())
    }

    /// Makes a volume of this size by a policy, attaches it and exports it on a unix socket.
    ///
    /// # Errors
    /// It finds no room, or the export does not come up.
    pub fn export(&self, volume: &str, policy: &str, bytes: u64) -> Result<Export> {
        self.ask(&["volume", "create", volume, "--size", &bytes.to_string(), "--policy", policy])?;
        let attached = self.ask(&["volume", "attach", volume, "--node", "bench"])?;
        let field = |name: &str| attached[name].as_str().map(str::to_owned).with_context(|| format!("no {name}"));
        let socket = self.folder.join(format!("{volume}.sock"));
        let mut command = self.shape.driver.command(&self.programs.join("lamina-csi-node"));
        command.args(["export", "--cluster", &self.id, "--leader", &self.leader]);
        command.args(["--volume", &field("volumeId")?, "--session", &field("session")?]);
        command.arg("--listen").arg(format!("unix://{}", socket.display()));
        let name = format!("export of {volume}, {:?}", self.shape.mode);
        let program = Program::start(&name, &self.folder, command)?;
        program.wait_for_socket(&socket)?;
        let (volume, program) = (volume.to_owned(), Arc::new(program));
        Ok(Export { volume, bytes, target: Target::Nbd(socket), program })
    }

    /// As [`Self::export`], with one copy or two, as one of those that are compared.
    ///
    /// # Errors
    /// As [`Self::export`].
    pub fn contender(&self, copies: u8, bytes: u64) -> Result<Contender> {
        let policy = if copies == 1 { "one" } else { "two" };
        let export = self.export(&format!("v-{policy}"), policy, bytes)?;
        let mut programs = vec![self.operator.clone(), export.program];
        programs.extend(self.servers.iter().map(|server| server.program().clone()));
        Ok(Contender { name: self.name(copies), note: String::new(), target: export.target, programs })
    }

    fn name(&self, copies: u8) -> &'static str {
        match (copies, self.shape.mode) {
            (1, Mode::InPlace) => "Lamina, 1 copy",
            (_, Mode::InPlace) => "Lamina, 2 copies",
            (1, Mode::Journal) => "Lamina, 1 copy, journal",
            (_, Mode::Journal) => "Lamina, 2 copies, journal",
        }
    }

    /// What `inspect` says of the servers' devices, and the volume's bytes that it rebuilt in `output`. The servers must have
    /// ended.
    ///
    /// # Errors
    /// Active copies differ, or blocks are lost.
    pub fn inspect(&self, output: &Path) -> Result<String> {
        let mut command = Place::LOOPBACK.command(&self.programs.join("lamina-storage-node"));
        command.arg("inspect").arg("--output").arg(output).args(self.servers.iter().map(Server::device));
        let done = command.output()?;
        let report = String::from_utf8_lossy(&done.stdout).into_owned();
        if !done.status.success() {
            bail!("inspect: {report}{}", String::from_utf8_lossy(&done.stderr));
        }
        Ok(report)
    }
}
