//! `crdgen`: writes the CustomResourceDefinitions as YAML files into a folder.
//!
//! Invariant: writes only files named `lamina.dev_*.yaml` there, and each whole or not at all.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

/// Writes the manifests of Lamina's API (one file per kind) into a folder.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example:\n  crdgen charts/lamina/crds\n  kubectl apply --server-side -f charts/lamina/crds"
)]
struct Arguments {
    /// The folder; made if it is not there.
    folder: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Arguments { folder } = Arguments::parse();
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    for manifest in lamina_crds::manifests()? {
        let path = folder.join(&manifest.file);
        let part = folder.join(format!(".{}.part", manifest.file));
        std::fs::write(&part, manifest.yaml()?).with_context(|| format!("cannot write {}", part.display()))?;
        std::fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}
