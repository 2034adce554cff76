//! The cluster that the cases share: brought up at the first case, filled as far as the next one needs, taken down at
//! the end.

use std::path::PathBuf;
use std::time::Duration;

use lamina_cluster::host::wait_until;
use lamina_cluster::image::{self, Recipe};
use lamina_cluster::{Cluster, ClusterError, Tools};
use lamina_demo::kube::{self, KubeError};
use lamina_demo::objects::Pod;
use lamina_demo::{images, install, run};

use crate::manifests::{claim, pod, write_noise};

/// Size of each node's file device.
pub(crate) const DEVICE: &str = "2Gi";

/// What a case needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Needs {
    /// A Kubernetes.
    Cluster,
    /// Lamina installed on it, all storage servers Ready.
    Programs,
}

/// The cluster and how far it is filled.
pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    installed: bool,
    folder: Option<tempfile::TempDir>,
}

impl Stage {
    /// Brings a cluster of three nodes up, or takes the one that is named.
    ///
    /// # Errors
    /// Why no cluster can be had on this machine.
    pub(crate) fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("needs root".into());
        }
        let tools = Tools::find().map_err(|error| error.to_string())?;
        if let Some(dir) = std::env::var_os("LAMINA_TEST_CLUSTER") {
            let cluster = Cluster::open(&PathBuf::from(dir)).map_err(|error| error.to_string())?;
            return Ok(Self { cluster, installed: false, folder: None });
        }
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("state");
        let cluster = Cluster::up(dir.clone(), &tools, 3, &|line| println!("{line}")).unwrap_or_else(|error| {
            Cluster::down(&dir, &|line| println!("{line}")).ok();
            panic!("the cluster does not come up: {error}")
        });
        Ok(Self { cluster, installed: false, folder: Some(folder) })
    }

    /// What a case of these needs would miss.
    pub(crate) fn lacks(&self, needs: Needs) -> Option<String> {
        if needs < Needs::Programs {
            return None;
        }
        images::missing_programs().map(|missing| missing.to_string())
    }

    /// Brings the cluster as far as a case needs.
    pub(crate) fn prepare(&mut self, needs: Needs) {
        if needs < Needs::Programs || self.installed {
            return;
        }
        for tar in images::all(self.cluster.tools()).unwrap() {
            self.cluster.import_image(&tar).unwrap();
        }
        install::chart(&self.cluster, DEVICE).unwrap();
        install::await_servers(&self.cluster, Duration::from_secs(180), &|line| println!("{line}")).unwrap();
        install::await_rollout(&self.cluster).unwrap();
        self.cluster.apply(run::STORAGE.split("---\napiVersion: v1").next().unwrap()).unwrap();
        self.installed = true;
    }

    /// Takes an image into the nodes.
    pub(crate) fn import(&self, recipe: &Recipe) {
        self.cluster.import_image(&recipe.build_cached().unwrap()).unwrap();
    }

    pub(crate) fn postgres_image(&self) {
        self.import(&image::postgres());
    }

    pub(crate) fn kubectl(&self, words: &str) -> String {
        self.cluster.kubectl(&words.split(' ').collect::<Vec<_>>()).unwrap()
    }

    /// A shell in a pod.
    pub(crate) fn sh(&self, pod: &str, script: &str) -> Result<String, ClusterError> {
        self.cluster.kubectl(&["exec", pod, "--", "sh", "-c", script])
    }

    pub(crate) fn await_pod(&self, name: &str, not_uid: &str) -> Pod {
        kube::await_ready(&self.cluster, name, not_uid, Duration::from_secs(120)).unwrap()
    }

    pub(crate) fn await_that(&self, what: &str, seconds: u64, mut done: impl FnMut() -> bool) {
        wait_until(what, Duration::from_secs(seconds), || {
            let done = done();
            if !done {
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok::<_, KubeError>(done)
        })
        .unwrap();
    }

    /// Waits until all is as after the installation, for the cases that follow.
    pub(crate) fn calm(&self) {
        self.kubectl("wait --for=condition=Ready node --all --timeout=90s");
        install::await_servers(&self.cluster, Duration::from_secs(180), &|line| println!("{line}")).unwrap();
        install::await_rollout(&self.cluster).unwrap();
    }

    /// What helps to see why a case failed.
    pub(crate) fn show(&self) {
        let looks = [
            "get pods,pvc,pv,volumeattachments,volumes,storageservers -A -o wide",
            "get events -A --sort-by=.lastTimestamp",
            "-n lamina logs -l app.kubernetes.io/component=operator -c operator --tail=40 --prefix",
            "-n lamina logs -l app.kubernetes.io/component=csi-node --tail=30 --prefix",
            "-n lamina logs -l app.kubernetes.io/component=storage-node --tail=20 --prefix",
        ];
        for look in looks {
            let words: Vec<&str> = look.split(' ').collect();
            let text = self.cluster.kubectl(&words).unwrap_or_else(|error| error.to_string());
            println!(
                "--- kubectl {look}\n{}",
                text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
    }

    /// Takes away what a case left in the default namespace.
    pub(crate) fn clear(&self) {
        for words in [
            ["delete", "statefulsets,pods", "--all", "--wait=true", "--timeout=90s", "--now"].as_slice(),
            ["delete", "pvc,configmaps", "--all", "--wait=true", "--timeout=60s"].as_slice(),
        ] {
            if let Err(error) = self.cluster.kubectl(words) {
                println!("clearing up: {error}");
            }
        }
    }
}

impl Stage {
    /// Takes the cluster down if it was made here, with a pod that uses a volume: the worst case, as its device's server is
    /// killed before its users are. Tells what is left of the cluster.
    ///
    /// # Errors
    /// What is left, in words.
    pub(crate) fn end(mut self) -> Result<(), String> {
        if self.folder.is_none() {
            return Ok(());
        }
        if self.installed {
            let text = claim("last", "64Mi", "Filesystem", "lamina-demo") + &pod("last", "last", false, "");
            self.cluster.apply(&text).unwrap();
            self.await_pod("last", "");
            write_noise(&self, "last");
        }
        let folder = self.folder.take();
        let dir = self.cluster.dir().to_path_buf();
        Cluster::down(&dir, &|line| println!("{line}")).map_err(|error| error.to_string())?;
        drop(folder);
        if dir.exists() { Err(format!("files in {}", dir.display())) } else { Ok(()) }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.folder.is_some()
            && let Err(error) = Cluster::down(self.cluster.dir(), &|line| println!("{line}"))
        {
            println!("taking the cluster down: {error}");
        }
    }
}
