//! The chart's manifests are what the types say.
#![allow(clippy::unwrap_used)]

use std::path::Path;

/// `UPDATE_GOLDEN=1 cargo test -p lamina-crds` writes them anew.
#[test]
fn the_charts_manifests_are_what_the_types_generate() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/lamina/crds");
    let manifests = lamina_crds::manifests().unwrap();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        for manifest in &manifests {
            std::fs::write(folder.join(&manifest.file), manifest.yaml().unwrap()).unwrap();
        }
    }
    for manifest in &manifests {
        let kept = std::fs::read_to_string(folder.join(&manifest.file)).unwrap_or_default();
        let generated = manifest.yaml().unwrap();
        let line = kept.lines().zip(generated.lines()).position(|(a, b)| a != b);
        assert!(
            kept == generated,
            "charts/lamina/crds/{} is not what the types generate (first difference in line {:?}); \
             UPDATE_GOLDEN=1 cargo test -p lamina-crds --test golden writes it anew",
            manifest.file,
            line.map(|n| n + 1),
        );
    }
    let mut kept: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    kept.sort();
    let mut generated: Vec<_> = manifests.iter().map(|m| m.file.clone().into()).collect::<Vec<std::ffi::OsString>>();
    generated.sort();
    assert_eq!(kept, generated, "a manifest that no type generates");
}
