//! The story of the demo, from nothing to the verdict.
//!
//! Invariant: the order is load, blow, recovery, blow, recovery, move, verdict; each step checks what it promises and
//! the first miss ends the run with an error that says what was missed. A kubelet that was stopped is let go on and a
//! cordoned node is uncordoned on every way out.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lamina_cluster::host::{HostError, wait_until};
use lamina_cluster::{Cluster, Tools};

use crate::check::{self, Verdict};
use crate::commits::{Clients, database};
use crate::door::Door;
use crate::faults::{self, Blow};
use crate::images::{self, source_tree};
use crate::install;
use crate::kube::{self, KubeError};
use crate::log::{self, now_ms};
use crate::moved::Given;
use crate::objects::{Pod, Volume};
use crate::say::Teller;

/// Policy, class and claim.
pub const STORAGE: &str = include_str!("../manifests/storage.yaml");
/// PostgreSQL with pgbench.
pub const POSTGRES: &str = include_str!("../manifests/postgres.yaml");
/// Size of each node's file device: the demo writes some 400 MiB, each copy of it once.
const DEVICE: &str = "2Gi";
const CLIENTS: u32 = 4;
/// How long the second server is kept away.
const AWAY: Duration = Duration::from_secs(15);
/// Longest time for a copy to be filled again on this machine.
const REFILL: Duration = Duration::from_secs(180);

/// What was promised and not seen.
#[derive(Debug, thiserror::Error)]
pub enum Miss {
    /// A step failed.
    #[error(transparent)]
    Kube(#[from] KubeError),
    /// The cluster.
    #[error(transparent)]
    Cluster(#[from] lamina_cluster::ClusterError),
    /// A program or file of the machine, or something awaited that did not come.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Programs or images.
    #[error(transparent)]
    Build(#[from] images::BuildError),
    /// No blow was struck.
    #[error(transparent)]
    Fault(#[from] faults::FaultError),
    /// The clients.
    #[error(transparent)]
    Commits(#[from] crate::commits::CommitError),
    /// The log.
    #[error(transparent)]
    Log(#[from] log::LogError),
    /// The check could not be made.
    #[error(transparent)]
    Check(#[from] check::CheckError),
    /// The build of Kubernetes' programs failed.
    #[error("e2e/cluster/build-tools.sh failed: see its words above")]
    Tools,
    /// SIGKILL did not kill.
    #[error("the storage server on {0} lives after SIGKILL")]
    Undead(String),
    /// The pod came back on the node that it was to leave.
    #[error("the pod is still on {0}")]
    NotMoved(String),
    /// Acknowledged commits are lost, or changed.
    #[error("LOST: {0}")]
    Lost(String),
    /// PostgreSQL found a page whose checksum is wrong.
    #[error("PostgreSQL counted {0} checksum failures")]
    Checksums(i64),
}

/// Where the demo keeps its cluster and its log.
#[derive(Debug, Clone)]
pub struct Places {
    /// The cluster's state directory.
    pub cluster: PathBuf,
    /// The log of acknowledged commits: on this machine's disk, outside every volume.
    pub log: PathBuf,
}

impl Places {
    /// Beside the state of other clusters of this user, or below `LAMINA_DEMO_DIR`.
    ///
    /// # Errors
    /// No home folder is known.
    pub fn usual() -> Result<Self, lamina_cluster::layout::NoHome> {
        let base = match std::env::var_os("LAMINA_DEMO_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => lamina_cluster::Layout::default_dir()?.with_file_name("demo"),
        };
        Ok(Self { cluster: base.join("cluster"), log: base.join("commits.log") })
    }
}

/// One window of the story with what it cost the clients.
#[derive(Debug)]
struct Chapter {
    what: &'static str,
    from_ms: u64,
    to_ms: u64,
    before: u64,
    after: u64,
}

/// A cluster with the load on it.
struct Scene<'a> {
    teller: &'a Teller,
    cluster: &'a Cluster,
    clients: &'a Clients,
    volume: String,
}

/// On what the demo runs.
#[derive(Debug, Clone)]
pub enum Ground {
    /// A cluster made anew, with so many nodes.
    Own(u8),
    /// The cluster and the programs of an earlier run, as they are.
    Kept,
    /// A cluster of somebody else, by its kubeconfig. Its nodes must have, or be able to pull, the images.
    Existing(PathBuf),
}

/// Runs the demo.
///
/// # Errors
/// The first [`Miss`].
pub fn run(places: &Places, ground: &Ground, teller: &Teller) -> Result<(), Miss> {
    let cluster = match ground {
        Ground::Own(nodes) => prepare(places, *nodes, teller)?,
        Ground::Kept => Cluster::open(&places.cluster)?,
        Ground::Existing(kubeconfig) => {
            let cluster = Cluster::existing(kubeconfig.clone(), places.cluster.clone(), teller.step("tools", tools)?);
            put_lamina(&cluster, teller)?;
            cluster
        }
    };
    let pod = start_postgres(&cluster, teller)?;
    let volume = kube::volume_of_claim(&cluster, "postgres")?;
    teller.say(format_args!("PostgreSQL runs on {} on the volume {}", pod.spec.node_name, volume.metadata.name));
    teller.say(format_args!("  {}", volume.in_short()));
    std::fs::remove_file(&places.log).ok();
    if let Some(folder) = places.log.parent() {
        lamina_cluster::host::at(folder, std::fs::create_dir_all(folder))?;
    }
    let begun_ms = now_ms();
    let door = Door::to(&cluster, &pod)?;
    let clients = Clients::start(&door.address, &places.log, CLIENTS)?;
    let scene = Scene { teller, cluster: &cluster, clients: &clients, volume: volume.metadata.name };
    scene.await_commits(100)?;
    let spare = pod.spec.node_name.clone();
    let (first, killed) = scene.killed_and_back(&spare)?;
    let second = scene.killed_and_kept_away(&[spare, killed])?;
    let (third, _door) = scene.moved(&pod, door)?;
    let told = clients.stop()?;
    let ended_ms = now_ms();
    teller.title("the verdict");
    teller.say(format_args!("{told} commits were acknowledged and logged in {}", places.log.display()));
    let verdict = judge(&cluster, &places.log, teller)?;
    let log = log::read(&places.log)?;
    summary(teller, &cluster, &log, &[first, second, third], (begun_ms, ended_ms), &verdict);
    Ok(())
}

/// Programs, cluster, images, chart.
fn prepare(places: &Places, nodes: u8, teller: &Teller) -> Result<Cluster, Miss> {
    teller.title("programs");
    let tools = teller.step("the programs of Kubernetes (the first build takes 10 to 20 minutes)", tools)?;
    teller.step("Lamina's programs (cargo build)", images::build_programs)?;
    let tars = teller.step("images, without a daemon or a registry", || images::all(&tools))?;
    teller.title(format_args!("a Kubernetes with {nodes} nodes on this machine"));
    Cluster::down(&places.cluster, &|line| teller.say(line))?;
    let cluster = Cluster::up(places.cluster.clone(), &tools, nodes, &|line| teller.say(line))?;
    teller.step("images into the nodes", || tars.iter().try_for_each(|tar| cluster.import_image(tar)))?;
    put_lamina(&cluster, teller)?;
    Ok(cluster)
}

fn put_lamina(cluster: &Cluster, teller: &Teller) -> Result<(), Miss> {
    teller.title("Lamina");
    teller.step("helm install", || install::chart(cluster, DEVICE))?;
    teller.step("storage servers", || {
        install::await_servers(cluster, Duration::from_secs(180), &|line| teller.say(line))
    })?;
    teller.step("operator, storage nodes and node plugins", || install::await_rollout(cluster))?;
    Ok(())
}

/// Kubernetes' programs, built if they are not there.
fn tools() -> Result<Tools, Miss> {
    if let Ok(tools) = Tools::find() {
        return Ok(tools);
    }
    let script = source_tree().join("e2e/cluster/build-tools.sh");
    let status = Command::new(&script).status().map_err(|_| Miss::Tools)?;
    if !status.success() {
        return Err(Miss::Tools);
    }
    Ok(Tools::find().map_err(lamina_cluster::ClusterError::from)?)
}

fn start_postgres(cluster: &Cluster, teller: &Teller) -> Result<Pod, Miss> {
    teller.title("a volume of 2 copies, striped over 2 groups, and PostgreSQL on it");
    cluster.apply(STORAGE)?;
    cluster.apply(POSTGRES)?;
    Ok(teller.step("the claim bound, the volume formatted, initdb, PostgreSQL up", || {
        kube::await_ready(cluster, "postgres-0", "", Duration::from_secs(240))
    })?)
}

impl Scene<'_> {
    /// Waits for so many more acknowledged commits.
    fn await_commits(&self, more: u64) -> Result<(), Miss> {
        let wanted = self.clients.acknowledged() + more;
        self.teller.step(format_args!("{more} more commits"), || {
            wait_until::<HostError>("acknowledged commits", Duration::from_secs(90), || {
                Ok(self.clients.acknowledged() >= wanted)
            })
        })?;
        Ok(())
    }

    fn now(&self) -> Result<Volume, Miss> {
        Ok(kube::volume(self.cluster, &self.volume)?)
    }

    fn healthy(&self) -> Result<Volume, Miss> {
        let what = "to be Healthy again";
        Ok(self.teller.step("copies filled again", || {
            kube::await_volume(self.cluster, &self.volume, what, REFILL, Volume::is_healthy)
        })?)
    }

    /// SIGKILL; the kubelet starts the container again at once.
    fn killed_and_back(&self, spare: &str) -> Result<(Chapter, String), Miss> {
        self.teller.title("a storage server is killed and restarted at once");
        let before = self.now()?;
        self.teller.say(format_args!("before: {}", before.in_short()));
        let (from_ms, given) = (now_ms(), Given::now(self.cluster, &before));
        let blow = faults::strike(self.cluster, &self.volume, &[spare.to_owned()], false)?;
        self.show(&blow)?;
        let old = before.status.generation;
        kube::await_volume(self.cluster, &self.volume, "to have a newer map", Duration::from_secs(60), |volume| {
            volume.status.generation > old
        })?;
        self.await_commits(50)?;
        let after = self.healthy()?;
        self.teller.say(format_args!("after:  {}", after.in_short()));
        self.tell_moved(given, &after);
        let (before, after) = (old, after.status.generation);
        let what = "server killed, restarted at once";
        Ok((Chapter { what, from_ms, to_ms: now_ms(), before, after }, blow.target.node))
    }

    /// SIGKILL with the kubelet stopped, so that the server stays away until the kubelet goes on.
    fn killed_and_kept_away(&self, spare: &[String]) -> Result<Chapter, Miss> {
        self.teller.title(format_args!("a storage server is killed and kept away for {} s", AWAY.as_secs()));
        let before = self.now()?;
        self.teller.say(format_args!("before: {}", before.in_short()));
        let (from_ms, given) = (now_ms(), Given::now(self.cluster, &before));
        let start = Instant::now();
        let blow = faults::strike(self.cluster, &self.volume, spare, true)?;
        let frozen = Frozen { cluster: self.cluster, node: blow.target.node.clone() };
        self.show(&blow)?;
        let how = if self.cluster.is_own() { "the kubelet is stopped" } else { "the node is tainted" };
        self.teller.say(format_args!("{}: {how}, so nothing starts it again", blow.target.node));
        let server = blow.target.server.clone();
        let failed = |volume: &Volume| volume.members_on(&server).any(|(_, member)| member.state == "Failed");
        let seen = kube::await_volume(self.cluster, &self.volume, "to go on without it", AWAY, failed)?;
        self.teller.say(format_args!("committed without it: {}", seen.in_short()));
        self.await_commits(100)?;
        self.teller.step("the rest of the 15 s", || {
            wait_until::<HostError>("the time to pass", AWAY * 2, || Ok(start.elapsed() >= AWAY))
        })?;
        drop(frozen);
        self.teller.say(format_args!("{} may run it again", blow.target.node));
        let after = self.healthy()?;
        self.teller.say(format_args!("after:  {}", after.in_short()));
        self.tell_moved(given, &after);
        let what = "server killed, 15 s away";
        let (before, after) = (before.status.generation, after.status.generation);
        Ok(Chapter { what, from_ms, to_ms: now_ms(), before, after })
    }

    /// What the rejoin cost: only what differs is moved, not the volume.
    fn tell_moved(&self, before: Result<Given, KubeError>, volume: &Volume) {
        let moved = before.and_then(|before| Ok(before.until(&Given::now(self.cluster, volume)?)));
        match moved {
            Ok(moved) => self.teller.say(format_args!("rejoined by difference: {}", moved.against(volume))),
            // Somebody else's cluster may not let one look at pods.
            Err(error) => self.teller.say(format_args!("what was moved is not known: {error}")),
        }
    }

    fn show(&self, blow: &Blow) -> Result<(), Miss> {
        let target = &blow.target;
        if !self.cluster.is_own() {
            let copies = target.copies.join(", ");
            let pod = &target.pod.metadata.name;
            self.teller.say(format_args!("{pod} on {} is deleted by force; it holds {copies}", target.node));
            return Ok(());
        }
        self.teller.say(format_args!(
            "SIGKILL to {} on {} (process {:?}): it had written {} KiB in the last {} ms \
             and holds the Active copies {}",
            target.pod.metadata.name,
            target.node,
            target.pids,
            blow.wrote_bytes / 1024,
            blow.within.as_millis(),
            target.copies.join(", ")
        ));
        wait_until::<HostError>("the process to be dead", Duration::from_secs(2), || Ok(faults::is_dead(target)))
            .map_err(|_| Miss::Undead(target.node.clone()))
    }

    /// The pod to another node, with the clients after it, through a door of its own.
    fn moved(&self, pod: &Pod, old: Door) -> Result<(Chapter, Door), Miss> {
        let from = pod.spec.node_name.as_str();
        self.teller.title(format_args!("the pod moves from {from} to another node"));
        let before = self.now()?;
        let from_ms = now_ms();
        let closed = Cordoned::new(self.cluster, from)?;
        self.cluster.kubectl(&["delete", "pod", "postgres-0", "--wait=false"])?;
        let fresh = self.teller.step("detach, attach, mount, recovery of PostgreSQL", || {
            kube::await_ready(self.cluster, "postgres-0", &pod.metadata.uid, Duration::from_secs(180))
        })?;
        drop(closed);
        // kubectl may keep a connection open though its pod is gone: a client that waits there would wait for ever.
        drop(old);
        if fresh.spec.node_name == from {
            return Err(Miss::NotMoved(from.to_owned()));
        }
        self.teller.say(format_args!("PostgreSQL runs on {}", fresh.spec.node_name));
        let door = Door::to(self.cluster, &fresh)?;
        self.clients.move_to(&door.address);
        self.await_commits(50)?;
        let after = self.now()?;
        self.teller.say(format_args!("after:  {}", after.in_short()));
        let (before, after) = (before.status.generation, after.status.generation);
        Ok((Chapter { what: "pod moved to another node", from_ms, to_ms: now_ms(), before, after }, door))
    }
}

/// Every logged commit, PostgreSQL's checksums, and `pg_amcheck`.
fn judge(cluster: &Cluster, log: &Path, teller: &Teller) -> Result<Verdict, Miss> {
    let pod = kube::pod(cluster, "default", "postgres-0")?;
    let door = Door::to(cluster, &pod)?;
    let verdict = teller.step("every logged commit looked up", || {
        Ok::<_, Miss>(check::check(&log::read(log)?, &database(&door.address))?)
    })?;
    teller.say(verdict.in_words());
    if !verdict.passes() {
        return Err(Miss::Lost(verdict.in_words()));
    }
    let mut client = database(&door.address).connect(postgres::NoTls).map_err(check::CheckError::from)?;
    let sum = "select coalesce(sum(checksum_failures), 0)::bigint from pg_stat_database";
    let row = client.query_one(sum, &[]).map_err(check::CheckError::from)?;
    match row.try_get(0).map_err(check::CheckError::from)? {
        0 => {}
        failures => return Err(Miss::Checksums(failures)),
    }
    teller.step("pg_amcheck over all tables and indexes", || {
        let words = "exec postgres-0 -c postgres -- pg_amcheck -h 127.0.0.1 -U postgres \
                     --install-missing --all --heapallindexed";
        cluster.kubectl(&words.split(' ').collect::<Vec<_>>())
    })?;
    teller.say("pg_amcheck is clean, no checksum failure was counted");
    Ok(verdict)
}

fn summary(
    teller: &Teller,
    cluster: &Cluster,
    log: &[log::Acknowledged],
    chapters: &[Chapter],
    whole: (u64, u64),
    verdict: &Verdict,
) {
    teller.title("all was as promised");
    for chapter in chapters {
        let (gap, _) = log::longest_gap(log, chapter.from_ms, chapter.to_ms);
        let Chapter { what, before, after, .. } = chapter;
        println!("  {what:<34} generation {before} -> {after}, longest gap between commits {:.2} s", gap.as_secs_f64());
    }
    let (gap, _) = log::longest_gap(log, whole.0, whole.1);
    println!("  {:<34} {} commits, none lost, longest gap {:.2} s", "the whole run", verdict.logged, gap.as_secs_f64());
    if cluster.is_own() {
        println!("  (etcd ran with --unsafe-no-fsync, all nodes share this machine's disk and cores)");
    }
    println!();
    println!("The cluster is up. What to look at next:");
    println!("  export KUBECONFIG={}", cluster.kubeconfig().display());
    println!("  export PATH={}:$PATH    # kubectl", cluster.tools().dir().display());
    println!("  kubectl get volumes,storageservers -o wide");
    println!("  kubectl describe volumes            # conditions and events");
    println!("  kubectl explain volume.status");
    println!("  kubectl -n lamina get pods -o wide; kubectl logs postgres-0 -c pgbench --tail=5");
    if cluster.is_own() {
        println!("  make clean-demo                     # removes all of it");
    } else {
        println!("  kubectl delete statefulset/postgres pvc/postgres && helm -n lamina uninstall lamina");
    }
}

/// A stopped kubelet, which goes on when this is dropped.
struct Frozen<'a> {
    cluster: &'a Cluster,
    node: String,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Err(error) = faults::thaw(self.cluster, &self.node) {
            eprintln!("the kubelet of {} is still stopped: {error}", self.node);
        }
    }
}

/// A cordoned node, open again when this is dropped.
struct Cordoned<'a> {
    cluster: &'a Cluster,
    node: String,
}

impl<'a> Cordoned<'a> {
    fn new(cluster: &'a Cluster, node: &str) -> Result<Self, Miss> {
        cluster.kubectl(&["cordon", node])?;
        Ok(Self { cluster, node: node.to_owned() })
    }
}

impl Drop for Cordoned<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.cluster.kubectl(&["uncordon", &self.node]) {
            eprintln!("{} is still cordoned: {error}", self.node);
        }
    }
}
