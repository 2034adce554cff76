//! A running node service, called as the kubelet calls it.

use super::program::{DIRECTORY, ROLE, SERVE, SESSION, VOLUME};
use lamina_csi_api::context::PublishContext;
use lamina_csi_api::v1;
use lamina_csi_api::v1::node_client::NodeClient;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Start this test program in another role; killed when dropped.
pub(crate) fn start(role: &str, volume: &str, directory: &Path) -> Killed {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--ignored", "--nocapture"])
        .env(ROLE, role)
        .env(VOLUME, volume)
        .env(DIRECTORY, directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    Killed(child.unwrap())
}

pub(crate) struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Process {
    child: Option<Killed>,
    client: NodeClient<Channel>,
    volume: String,
    staging: PathBuf,
}

impl Process {
    pub(crate) async fn start(volume: &str, directory: &Path, staging: PathBuf) -> Self {
        let child = Some(start(SERVE, volume, directory));
        let client = NodeClient::new(connect(&directory.join("csi.sock")).await);
        Self { child, client, volume: volume.to_owned(), staging }
    }

    /// SIGKILL, and wait until the process is no more.
    pub(crate) fn kill(&mut self) {
        self.child = None;
    }

    fn context() -> std::collections::HashMap<String, String> {
        PublishContext { session: SESSION, generation: NonZeroU64::MIN }.to_wire()
    }

    fn staging(&self) -> String {
        self.staging.display().to_string()
    }

    pub(crate) async fn stage(&mut self, capability: &v1::VolumeCapability) -> Result<(), Status> {
        let request = v1::NodeStageVolumeRequest {
            volume_id: self.volume.clone(),
            publish_context: Self::context(),
            staging_target_path: self.staging(),
            volume_capability: Some(capability.clone()),
            ..Default::default()
        };
        self.client.node_stage_volume(request).await.map(drop)
    }

    /// A kubelet of its own, on the same service.
    pub(crate) fn another(&self) -> Self {
        let (client, volume, staging) = (self.client.clone(), self.volume.clone(), self.staging.clone());
        Self { child: None, client, volume, staging }
    }

    pub(crate) async fn unstage(&mut self) -> Result<(), Status> {
        let request =
            v1::NodeUnstageVolumeRequest { volume_id: self.volume.clone(), staging_target_path: self.staging() };
        // Somebody (udev) may look at a device that has just been unmounted: ABORTED, come again.
        for _ in 0..20 {
            match self.client.node_unstage_volume(request.clone()).await {
                Err(status) if status.code() == Code::Aborted => tokio::time::sleep(Duration::from_millis(100)).await,
                result => return result.map(drop),
            }
        }
        self.client.node_unstage_volume(request).await.map(drop)
    }

    pub(crate) async fn publish(
        &mut self,
        capability: &v1::VolumeCapability,
        target: &Path,
        readonly: bool,
    ) -> Result<(), Status> {
        let request = v1::NodePublishVolumeRequest {
            volume_id: self.volume.clone(),
            publish_context: Self::context(),
            staging_target_path: self.staging(),
            target_path: target.display().to_string(),
            volume_capability: Some(capability.clone()),
            readonly,
            ..Default::default()
        };
        self.client.node_publish_volume(request).await.map(drop)
    }

    pub(crate) async fn unpublish(&mut self, target: &Path) -> Result<(), Status> {
        self.unpublish_of(&self.volume.clone(), target.to_str().unwrap()).await
    }

    pub(crate) async fn unpublish_of(&mut self, volume: &str, target: &str) -> Result<(), Status> {
        let request = v1::NodeUnpublishVolumeRequest { volume_id: volume.to_owned(), target_path: target.to_owned() };
        self.client.node_unpublish_volume(request).await.map(drop)
    }

    pub(crate) async fn stats(&mut self, path: &Path) -> Result<v1::NodeGetVolumeStatsResponse, Status> {
        self.stats_of(&self.volume.clone(), path.to_str().unwrap()).await
    }

    pub(crate) async fn stats_of(
        &mut self,
        volume: &str,
        path: &str,
    ) -> Result<v1::NodeGetVolumeStatsResponse, Status> {
        let request = v1::NodeGetVolumeStatsRequest {
            volume_id: volume.to_owned(),
            volume_path: path.to_owned(),
            ..Default::default()
        };
        Ok(self.client.node_get_volume_stats(request).await?.into_inner())
    }

    pub(crate) async fn expand(&mut self, path: &Path, required_bytes: i64) -> Result<i64, Status> {
        let request = v1::NodeExpandVolumeRequest {
            volume_id: self.volume.clone(),
            volume_path: path.display().to_string(),
            capacity_range: Some(v1::CapacityRange { required_bytes, limit_bytes: 0 }),
            ..Default::default()
        };
        Ok(self.client.node_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    /// The answers to requests that lack something, for volumes that do not exist.
    pub(crate) async fn incomplete_requests(&mut self) -> Vec<Code> {
        let id = || "nonsense".to_owned();
        let path = || "/x".to_owned();
        let client = &mut self.client;
        let stage = |volume_id, staging_target_path, volume_capability| v1::NodeStageVolumeRequest {
            volume_id,
            staging_target_path,
            volume_capability,
            ..Default::default()
        };
        let block = super::scene::block(super::Mode::SingleNodeWriter);
        let mut answers = Vec::new();
        for request in [
            stage(String::new(), path(), Some(block.clone())),
            stage(id(), String::new(), Some(block.clone())),
            stage(id(), path(), None),
        ] {
            answers.push(client.node_stage_volume(request.clone()).await.map(drop));
            let publish = v1::NodePublishVolumeRequest {
                volume_id: request.volume_id.clone(),
                target_path: request.staging_target_path.clone(),
                staging_target_path: path(),
                volume_capability: request.volume_capability,
                ..Default::default()
            };
            answers.push(client.node_publish_volume(publish).await.map(drop));
        }
        for (volume_id, path) in [(String::new(), path()), (id(), String::new())] {
            let unstage =
                v1::NodeUnstageVolumeRequest { volume_id: volume_id.clone(), staging_target_path: path.clone() };
            answers.push(client.node_unstage_volume(unstage).await.map(drop));
            let unpublish = v1::NodeUnpublishVolumeRequest { volume_id: volume_id.clone(), target_path: path.clone() };
            answers.push(client.node_unpublish_volume(unpublish).await.map(drop));
            let expand = v1::NodeExpandVolumeRequest {
                volume_id: volume_id.clone(),
                volume_path: path.clone(),
                ..Default::default()
            };
            answers.push(client.node_expand_volume(expand).await.map(drop));
            let stats = v1::NodeGetVolumeStatsRequest { volume_id, volume_path: path, ..Default::default() };
            answers.push(client.node_get_volume_stats(stats).await.map(drop));
        }
        answers.into_iter().map(|answer| answer.map_or_else(|status| status.code(), |()| Code::Ok)).collect()
    }
}

async fn connect(path: &Path) -> Channel {
    let at = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let at = at.clone();
        async move { tokio::net::UnixStream::connect(at).await.map(hyper_util::rt::TokioIo::new) }
    });
    let asked = Instant::now();
    loop {
        let endpoint = Endpoint::from_static("http://node");
        match endpoint.connect_with_connector(connector.clone()).await {
            Ok(channel) => return channel,
            Err(error) => assert!(asked.elapsed() < Duration::from_secs(60), "the node service comes up: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
