//! A cluster in namespaces with one volume under load, and the verdict over it.

use lamina_bench::lamina::{Cluster, Export, Mode, Shape};
use lamina_bench::load::Target;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

use crate::load::{self, COLD, HOT, VOLUME_BYTES};
use crate::network::{Network, Spot, missing};

/// All is done long before; a machine under load is slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
const SERVERS: usize = 3;
const DEVICE_BYTES: u64 = 96 << 20;
/// Of a volume that does not fit.
pub(crate) const FILLER_BYTES: u64 = 160 << 20;
/// Two copies over three groups: every server holds two copies, each with another neighbour.
pub(crate) const POLICY: &str = "striped";

/// The cluster with its volume.
pub(crate) struct Stage {
    pub(crate) export: Export,
    pub(crate) cluster: Cluster,
    pub(crate) network: Network,
    folder: TempDir,
}

impl Stage {
    /// Sets it up, with the volume written once; `None` if this machine lacks something, which is said.
    pub(crate) fn set(test: &str) -> Option<Self> {
        let programs = Path::new(env!("CARGO_BIN_EXE_lamina-bench")).parent().unwrap();
        if let Some(missing) = missing(programs) {
            println!("skipped: {test}: {missing}");
            return None;
        }
        let folder = tempfile::tempdir_in(programs).unwrap();
        let network = match Network::new(folder.path(), SERVERS) {
            Ok(network) => network,
            Err(why) => {
                println!("skipped: {test}: {why:#}");
                return None;
            }
        };
        let shape = Shape {
            mode: Mode::InPlace,
            device_bytes: DEVICE_BYTES,
            operator: network.place(Spot::Operator),
            servers: (0..SERVERS).map(|n| network.place(Spot::Server(n))).collect(),
            driver: network.place(Spot::Driver),
        };
        let cluster = Cluster::start(programs, folder.path(), shape).unwrap();
        let policy = ["policy", "create", POLICY, "--copies", "2", "--stripe-width", "3", "--page-size", "64Ki"];
        cluster.ask(&[&policy[..], &["--overcommit-percent", "1000"]].concat()).unwrap();
        let export = cluster.export("v", POLICY, VOLUME_BYTES).unwrap();
        load::write(&export.target, 1, HOT.start..COLD.end).unwrap();
        Some(Self { export, cluster, network, folder })
    }

    /// Waits until the volume is so.
    pub(crate) fn until(&self, what: &str, so: impl Fn(&Value) -> bool) {
        self.cluster.until("v", what, PATIENCE, so).unwrap();
    }

    /// The volume's generation.
    pub(crate) fn generation(&self) -> u64 {
        self.cluster.volume("v").unwrap()["status"]["generation"].as_u64().unwrap()
    }

    /// The ids of all copies in the map.
    pub(crate) fn copies(&self) -> Vec<String> {
        copies_in(&self.cluster.volume("v").unwrap())
    }

    /// Detaches and deletes another volume.
    pub(crate) fn let_go(&self, other: Export) {
        let Export { volume, program, .. } = other;
        program.signal(rustix::process::Signal::TERM).unwrap();
        program.wait(PATIENCE).unwrap();
        self.cluster.ask(&["volume", "detach", &volume, "--node", "bench"]).unwrap();
        self.cluster.ask(&["volume", "delete", &volume]).unwrap();
    }

    /// What lies on the devices of servers that were killed, whether copies differ or not.
    pub(crate) fn inspect_the_dead(&self) -> String {
        let report = self.cluster.inspect(&self.folder.path().join("rebuilt.img"));
        report.unwrap_or_else(|why| why.to_string())
    }

    /// All of the volume is read, through the driver and from the devices; Active copies are equal, others differ only where
    /// a mark says so. Gives the report of the devices.
    pub(crate) fn judge(self, last_pass: u32) -> String {
        assert!(last_pass > 2, "fio did nothing under the fault");
        let whole = |target: &Target| {
            load::verify(target, last_pass, HOT).unwrap();
            load::verify(target, 1, COLD).unwrap();
        };
        whole(&self.export.target);
        self.export.program.signal(rustix::process::Signal::TERM).unwrap();
        self.export.program.wait(PATIENCE).unwrap();
        self.cluster.servers.iter().for_each(|server| server.kill().unwrap());
        let image = self.folder.path().join("rebuilt.img");
        let report = self.cluster.inspect(&image).unwrap();
        let compared = report.lines().filter(|line| line.contains(" Active on ") && line.ends_with(" differ"));
        let compared: Vec<&str> = compared.collect();
        assert!(!compared.is_empty() && compared.iter().all(|line| line.ends_with(": 0 blocks differ")), "{report}");
        whole(&Target::Raw(image));
        report
    }
}

pub(crate) fn is_healthy(volume: &Value) -> bool {
    volume["status"]["state"] == "Healthy"
}

/// The copies that its map lists.
pub(crate) fn copies_in(volume: &Value) -> Vec<String> {
    let groups = volume["status"]["map"]["placements"][0]["groups"].as_array().unwrap().clone();
    let members = groups.iter().flat_map(|group| group["members"].as_array().unwrap().clone());
    members.map(|member| member["copy"].as_str().unwrap().to_owned()).collect()
}

pub(crate) fn is_degraded(volume: &Value) -> bool {
    volume["status"]["state"] == "Degraded"
}

pub(crate) fn condition_is(volume: &Value, kind: &str, status: &str) -> bool {
    let conditions = volume["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|c| c["type"] == kind && c["status"] == status))
}
