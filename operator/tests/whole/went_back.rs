//! A real API server that is put back to an old copy while its leader lives (R6).

use kube::api::{Patch, PatchParams};
use lamina_crds::Volume;
use lamina_crds::volume::{AttachmentPhase, VolumeState};
use lamina_operator::runtime::Ended;
use serde_json::json;

use super::kubernetes::Cluster;

fn attached(volume: Option<&Volume>) -> bool {
    let attachments = volume.and_then(|v| v.status.as_ref()).map(|s| s.attachments.clone()).unwrap_or_default();
    attachments.iter().any(|a| a.phase == AttachmentPhase::Attached)
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_a_leader_that_lives_through_a_restore_of_the_api_server_says_diverged_and_hears_who_adopts() {
    let test = "r6_a_leader_that_lives_through_a_restore_of_the_api_server_says_diverged_and_hears_who_adopts";
    let Some(mut cluster) = Cluster::start(test, 3).await else { return };
    let leader = cluster.replica("a", None);
    cluster.create("v", json!({})).await;
    let before = cluster.healthy("v").await.status.unwrap().generation;
    let saved = cluster.api.save().await.unwrap();
    let wish = |spec: serde_json::Value| Patch::Merge(json!({"spec": spec}));
    let attach = json!([{"node": "n", "session": format!("{:032x}", 0xaa), "mode": "ReadWrite"}]);
    let patched = wish(json!({"attachments": attach}));
    cluster.volumes().patch("v", &PatchParams::default(), &patched).await.unwrap();
    let newest = cluster.until("v", "attached", attached).await.unwrap().status.unwrap().generation;
    assert!(newest > before);

    cluster.api.restore(&saved).await.unwrap();
    let diverged = |v: Option<&Volume>| v.and_then(|v| v.status.as_ref()?.state) == Some(VolumeState::Diverged);
    let told = cluster.until("v", "diverged", diverged).await.unwrap();
    assert_eq!(told.status.unwrap().generation, before, "nothing was changed");
    let patched = wish(json!({"attachments": attach, "adoptGeneration": newest}));
    cluster.volumes().patch("v", &PatchParams::default(), &patched).await.unwrap();
    // The adopted map stands first; then every server obeys a newer one.
    let newer = |v: Option<&Volume>| v.and_then(|v| v.status.as_ref()?.generation) > newest;
    cluster.until("v", "attached again", |v| attached(v) && !diverged(v) && newer(v)).await.unwrap();
    assert_eq!(leader.stop().await, Ended::Stopped);
}
