//! Lamina as processes on loopback: an operator over a directory, two storage servers, and an export per volume.
//!
//! Invariant: programs and commands are those that people use without Kubernetes (README); nothing is wired within this
//! process.

use crate::contender::Contender;
use crate::load::Target;
use crate::process::Program;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// How the storage servers write data (R11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Once, where it belongs: the device keeps 4 KiB whole.
    InPlace,
    /// Through the journal first.
    Journal,
}

/// An operator with two storage servers.
#[derive(Debug)]
pub struct Cluster {
    programs: PathBuf,
    folder: PathBuf,
    mode: Mode,
    id: String,
    leader: String,
    servers: Vec<Arc<Program>>,
    operator: Arc<Program>,
}

impl Cluster {
    /// Starts it: the programs lie in `programs`, each server has a file of this size in the folder.
    ///
    /// # Errors
    /// A program is not there or does not come up.
    pub fn start(programs: &Path, folder: &Path, mode: Mode, device_bytes: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut command = Command::new(programs.join("lamina-operator"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--directory"]).arg(folder.join("objects"));
        let mut operator = Program::start(&format!("operator, {mode:?}"), folder, command)?;
        let (leader, id) = operator.wait_for("its address", |text| {
            let line = text.lines().find_map(|line| line.strip_prefix("lamina-operator listens on "))?;
            let (address, id) = line.split_once(", cluster ")?;
            Some((address.to_owned(), id.to_owned()))
        })?;
        let (programs, folder, operator) = (programs.to_owned(), folder.to_owned(), Arc::new(operator));
        let mut cluster = Self { programs, folder, mode, id, leader, servers: vec![], operator };
        for name in ["a", "b"] {
            cluster.add_server(name, device_bytes)?;
        }
        for (policy, copies) in [("one", "1"), ("two", "2")] {
            cluster.ask(&["policy", "create", policy, "--copies", copies])?;
        }
        Ok(cluster)
    }

    fn add_server(&mut self, name: &str, bytes: u64) -> Result<()> {
        let mode = if self.mode == Mode::InPlace { "atomic4k" } else { "journaled" };
        let device = format!("{},size={bytes}B,{mode}", self.folder.join(format!("{name}.img")).display());
        let mut command = Command::new(self.programs.join("lamina-storage-node"));
        command.args(["serve", "--log-format", "json", "--cluster", &self.id, "--device", &device]);
        command.args(["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
        let mut server = Program::start(&format!("server {name}, {:?}", self.mode), &self.folder, command)?;
        let control = server.wait_for("its address", |text| {
            let line = text.lines().find(|line| line.contains("listening"))?;
            let line: Value = serde_json::from_str(line).ok()?;
            Some(line["fields"]["control"].as_str()?.to_owned())
        })?;
        server.wait_for("its device", |text| text.contains("device opened").then_some(()))?;
        self.servers.push(Arc::new(server));
        self.ask(&["server", "add", name, "--control", &control]).map(drop)
    }

    /// Asks the operator as a person does; what it says as JSON.
    fn ask(&self, words: &[&str]) -> Result<Value> {
        let mut command = Command::new(self.programs.join("lamina-operator"));
        let done = command.args(words).args(["--operator", &self.leader, "-o", "json"]).output()?;
        if !done.status.success() {
            bail!("lamina-operator {}: {}", words.join(" "), String::from_utf8_lossy(&done.stderr));
        }
        serde_json::from_slice(&done.stdout).with_context(|| format!("what lamina-operator {} says", words[0]))
    }

    /// Makes a volume of this size with one copy or two, attaches it and exports it on a unix socket.
    ///
    /// # Errors
    /// It finds no room, or the export does not come up.
    pub fn export(&self, copies: u8, bytes: u64) -> Result<Contender> {
        let policy = if copies == 1 { "one" } else { "two" };
        let volume = format!("v-{policy}");
        self.ask(&["volume", "create", &volume, "--size", &bytes.to_string(), "--policy", policy])?;
        let attached = self.ask(&["volume", "attach", &volume, "--node", "bench"])?;
        let field = |name: &str| attached[name].as_str().map(str::to_owned).with_context(|| format!("no {name}"));
        let socket = self.folder.join(format!("{volume}.sock"));
        let mut command = Command::new(self.programs.join("lamina-csi-node"));
        command.args(["export", "--cluster", &self.id, "--leader", &self.leader]);
        command.args(["--volume", &field("volumeId")?, "--session", &field("session")?]);
        command.arg("--listen").arg(format!("unix://{}", socket.display()));
        let mut export = Program::start(&format!("export of {copies}, {:?}", self.mode), &self.folder, command)?;
        export.wait_for_socket(&socket)?;
        let mut programs = vec![self.operator.clone(), Arc::new(export)];
        programs.extend(self.servers.iter().cloned());
        Ok(Contender { name: self.name(copies), note: String::new(), target: Target::Nbd(socket), programs })
    }

    fn name(&self, copies: u8) -> &'static str {
        match (copies, self.mode) {
            (1, Mode::InPlace) => "Lamina, 1 copy",
            (_, Mode::InPlace) => "Lamina, 2 copies",
            (1, Mode::Journal) => "Lamina, 1 copy, journal",
            (_, Mode::Journal) => "Lamina, 2 copies, journal",
        }
    }
}
