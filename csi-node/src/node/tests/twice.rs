//! Each call of the node service twice at once and twice in a row, and the same call with other parameters.

use super::*;
use crate::service::{About, NodeService};
use lamina_csi_api::context::PublishContext;
use lamina_csi_api::topology::NodeTopology;
use lamina_csi_api::v1;
use lamina_csi_api::v1::node_server::Node as NodeApi;
use lamina_csi_api::v1::volume_capability::access_mode::Mode;
use lamina_csi_api::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use std::num::NonZeroU64;
use tonic::Request;

#[derive(Clone, Copy, Debug)]
enum Call {
    Stage {
        path: &'static str,
        filesystem: &'static str,
    },
    Publish {
        target: &'static str,
        readonly: bool,
    },
    /// Everything that only looks: capabilities, the node, the volume's use.
    Look,
    Expand,
    Unpublish,
    Unstage,
}

const STAGE: Call = Call::Stage { path: "/staging", filesystem: "xfs" };
const PUBLISH: Call = Call::Publish { target: "/pods/a", readonly: false };
/// In this order each finds what it needs.
const CALLS: [Call; 6] = [STAGE, PUBLISH, Call::Look, Call::Expand, Call::Unpublish, Call::Unstage];

fn capability(filesystem: &str) -> Option<v1::VolumeCapability> {
    let mount = MountVolume { fs_type: filesystem.to_owned(), ..Default::default() };
    Some(v1::VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(mount)),
    })
}

async fn make(service: &NodeService, call: Call) -> Result<(), Status> {
    let volume_id = handle().to_string();
    let publish_context = PublishContext { session: 1, generation: NonZeroU64::new(3).unwrap() }.to_wire();
    match call {
        Call::Stage { path, filesystem } => {
            let request = v1::NodeStageVolumeRequest {
                volume_id,
                publish_context,
                staging_target_path: path.into(),
                volume_capability: capability(filesystem),
                ..Default::default()
            };
            service.node_stage_volume(Request::new(request)).await.map(drop)
        }
        Call::Publish { target, readonly } => {
            let request = v1::NodePublishVolumeRequest {
                volume_id,
                publish_context,
                staging_target_path: "/staging".into(),
                target_path: target.into(),
                volume_capability: capability("xfs"),
                readonly,
                ..Default::default()
            };
            service.node_publish_volume(Request::new(request)).await.map(drop)
        }
        Call::Look => {
            let request = v1::NodeGetVolumeStatsRequest {
                volume_id,
                volume_path: "/pods/a".into(),
                staging_target_path: "/staging".into(),
            };
            service.node_get_volume_stats(Request::new(request)).await?;
            service.node_get_capabilities(Request::new(v1::NodeGetCapabilitiesRequest {})).await?;
            service.node_get_info(Request::new(v1::NodeGetInfoRequest {})).await.map(drop)
        }
        Call::Expand => {
            let request =
                v1::NodeExpandVolumeRequest { volume_id, volume_path: "/pods/a".into(), ..Default::default() };
            service.node_expand_volume(Request::new(request)).await.map(drop)
        }
        Call::Unpublish => {
            let request = v1::NodeUnpublishVolumeRequest { volume_id, target_path: "/pods/a".into() };
            service.node_unpublish_volume(Request::new(request)).await.map(drop)
        }
        Call::Unstage => {
            let request = v1::NodeUnstageVolumeRequest { volume_id, staging_target_path: "/staging".into() };
            service.node_unstage_volume(Request::new(request)).await.map(drop)
        }
    }
}

fn service(world: &World) -> NodeService {
    let topology = NodeTopology::new("n".parse().unwrap(), None).unwrap();
    NodeService::new(world.node(), InFlight::new(8), About { topology, max_volumes: 8 })
}

#[tokio::test]
async fn every_call_made_twice_at_once_and_again_is_done_once() {
    let world = World::new(3, &[1]);
    let service = service(&world);
    let both: &[&str] = &["/pods/a", "/staging"];
    let mounted: [&[&str]; 6] = [&["/staging"], both, both, both, &["/staging"], &[]];
    for (call, mounts) in CALLS.into_iter().zip(mounted) {
        let (one, two) = tokio::join!(make(&service, call), make(&service, call));
        let codes = [one, two].map(|result| result.map_or_else(|status| status.code(), |()| Code::Ok));
        let second = if matches!(call, Call::Look) { Code::Ok } else { Code::Aborted };
        assert_eq!(codes, [Code::Ok, second], "{call:?} at once");
        assert_eq!(world.mounts(), mounts, "{call:?}");
        let done = world.done();
        make(&service, call).await.unwrap();
        assert_eq!(world.mounts(), mounts, "{call:?} again");
        if !matches!(call, Call::Expand) {
            assert_eq!(world.done(), done, "{call:?} again");
        }
    }
    assert_eq!((world.opened(), world.attached()), (vec![(1, Start::Fresh)], false));
    let formats = world.done().iter().filter(|step| step.starts_with("format")).count();
    assert_eq!(formats, 1);
}

#[tokio::test]
async fn the_same_call_with_other_parameters_is_already_exists_and_changes_nothing() {
    let world = World::new(3, &[1]);
    let service = service(&world);
    for call in [STAGE, PUBLISH] {
        make(&service, call).await.unwrap();
    }
    let (done, mounts) = (world.done(), world.mounts());
    for call in [
        Call::Stage { path: "/elsewhere", filesystem: "xfs" },
        Call::Stage { path: "/staging", filesystem: "ext4" },
        Call::Publish { target: "/pods/a", readonly: true },
    ] {
        let status = make(&service, call).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{call:?}: {status}");
        assert_eq!((world.done(), world.mounts()), (done.clone(), mounts.clone()), "{call:?}");
    }
}
