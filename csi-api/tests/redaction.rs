//! No credential of a request reaches a log through `Debug`, whichever message it came in.

#![allow(clippy::unwrap_used)]
// Some of the messages have no further fields, most have.
#![allow(clippy::needless_update)]

use std::collections::HashMap;
use std::path::Path;

use lamina_csi_api::v1;

const SECRET: &str = "hunter2";

fn secrets() -> HashMap<String, String> {
    HashMap::from([("user".to_owned(), SECRET.to_owned()), (SECRET.to_owned(), String::new())])
}

/// `Debug` of every message that has secrets, filled with some, and with an id that should show.
macro_rules! shown {
    ($($message:ident { $id:ident }),* $(,)?) => {
        vec![$((
            stringify!($message),
            format!("{0:?} {0:#?}", v1::$message { $id: "visible".into(), secrets: secrets(), ..Default::default() }),
        )),*]
    };
}

fn all_shown() -> Vec<(&'static str, String)> {
    shown![
        CreateVolumeRequest { name },
        DeleteVolumeRequest { volume_id },
        ControllerPublishVolumeRequest { volume_id },
        ControllerUnpublishVolumeRequest { volume_id },
        ValidateVolumeCapabilitiesRequest { volume_id },
        ControllerModifyVolumeRequest { volume_id },
        ControllerExpandVolumeRequest { volume_id },
        CreateSnapshotRequest { name },
        DeleteSnapshotRequest { snapshot_id },
        ListSnapshotsRequest { snapshot_id },
        GetSnapshotRequest { snapshot_id },
        NodeStageVolumeRequest { volume_id },
        NodePublishVolumeRequest { volume_id },
        NodeExpandVolumeRequest { volume_id },
        CreateVolumeGroupSnapshotRequest { name },
        DeleteVolumeGroupSnapshotRequest { group_snapshot_id },
        GetVolumeGroupSnapshotRequest { group_snapshot_id },
        GetMetadataAllocatedRequest { snapshot_id },
        GetMetadataDeltaRequest { base_snapshot_id },
    ]
}

#[test]
fn a_request_shows_everything_but_its_secrets() {
    for (message, text) in all_shown() {
        assert!(!text.contains(SECRET) && !text.contains("user"), "{message}: {text}");
        assert!(text.contains("visible") && text.contains("<2 not shown>"), "{message}: {text}");
    }
}

/// A message that gets a secret field later must enter the list above.
#[test]
fn no_message_with_secrets_is_left_out_above() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let files =
        ["csi/v1/controller.proto", "csi/v1/node.proto", "csi/v1/group.proto", "csi/v1/snapshot_metadata.proto"];
    let mut compiler = protox::Compiler::new([root]).unwrap();
    compiler.include_imports(true).open_files(files).unwrap();
    let pool = compiler.descriptor_pool();
    let mark = pool.get_extension_by_name("csi.v1.csi_secret").unwrap();
    let secretive =
        |field: protox::prost_reflect::FieldDescriptor| field.options().get_extension(&mark).as_bool() == Some(true);
    let mut marked: Vec<String> = pool
        .all_messages()
        .filter(|message| message.fields().any(secretive))
        .map(|message| message.name().to_owned())
        .collect();
    let mut listed: Vec<String> = all_shown().into_iter().map(|(message, _)| message.to_owned()).collect();
    marked.sort();
    listed.sort();
    assert_eq!(marked, listed);
}
