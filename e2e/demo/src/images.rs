//! The programs, built, and the images that the demo and the tests put them in.
//!
//! The programs are linked with the machine's glibc, and the image brings glibc from the same Debian; so both are of
//! one release.

use std::path::{Path, PathBuf};
use std::process::Command;

use lamina_cluster::Tools;
use lamina_cluster::image::{self, ImageError, Recipe};

/// The three programs.
pub const PROGRAMS: [&str; 3] = ["lamina-operator", "lamina-storage-node", "lamina-csi-node"];
/// Image and version of them, as the chart's values say.
pub const LAMINA: &str = "lamina.dev/lamina:0.1.0";
/// The sidecars: program, and image as the demo's values name it.
pub const SIDECARS: [(&str, &str); 3] = [
    ("csi-provisioner", "lamina.dev/csi-provisioner:v6.3.0"),
    ("csi-attacher", "lamina.dev/csi-attacher:v4.12.0"),
    ("csi-resizer", "lamina.dev/csi-resizer:v2.2.0"),
];

/// Why programs or images cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// cargo cannot be started.
    #[error("cargo cannot be started: {0}")]
    NoCargo(std::io::Error),
    /// cargo failed; it said why.
    #[error("the programs cannot be built: see cargo's words above")]
    Failed,
    /// A program is missing where it should have been built.
    #[error(
        "{0} is not built: run `cargo build --release -p lamina-operator -p lamina-storage-node -p lamina-csi-node`"
    )]
    NotBuilt(PathBuf),
    /// An image cannot be assembled.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// The checkout that this program was built from.
#[must_use]
pub fn source_tree() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.ancestors().nth(2).unwrap_or(own).to_path_buf()
}

/// Where the programs are, or will be: beside this one, so that both are of one build. `LAMINA_PROGRAMS` names another
/// folder.
#[must_use]
pub fn programs_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("LAMINA_PROGRAMS") {
        return PathBuf::from(dir);
    }
    let own = std::env::current_exe().unwrap_or_default();
    // Tests lie one folder deeper.
    let dir = own.parent().unwrap_or(Path::new(""));
    dir.parent().filter(|_| dir.ends_with("deps")).unwrap_or(dir).to_path_buf()
}

/// Builds the programs, with cargo's own progress on the terminal, unless `LAMINA_PROGRAMS` names a folder that has
/// them. This program is among the packages, as in the Makefile: cargo unites the features of what it is asked for, and
/// another choice of packages would compile their dependencies anew.
///
/// # Errors
/// cargo fails.
pub fn build_programs() -> Result<(), BuildError> {
    let dir = programs_dir();
    if std::env::var_os("LAMINA_PROGRAMS").is_some() {
        return Ok(());
    }
    let mut cargo = Command::new("cargo");
    let packages = PROGRAMS.into_iter().chain([env!("CARGO_PKG_NAME")]);
    cargo.arg("build").args(packages.flat_map(|name| ["-p", name])).current_dir(source_tree());
    cargo.arg("--target-dir").arg(dir.parent().unwrap_or(&dir));
    if dir.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().map_err(BuildError::NoCargo)?;
    if status.success() { Ok(()) } else { Err(BuildError::Failed) }
}

/// Which programs are not built.
#[must_use]
pub fn missing_programs() -> Option<BuildError> {
    let paths = PROGRAMS.map(|name| programs_dir().join(name));
    paths.into_iter().find(|path| !path.is_file()).map(BuildError::NotBuilt)
}

/// Lamina's image: the programs, mkfs, fsck and mount.
#[must_use]
pub fn lamina(name: &str) -> Recipe {
    let with_program =
        |recipe: Recipe, program: &&str| recipe.with_bin(programs_dir().join(program), format!("/usr/bin/{program}"));
    PROGRAMS.iter().fold(image::storage_tools().named(name).with_debs(["libgcc-s1"]), with_program)
}

/// Every image that the chart and the demo need, built or found built: their tars.
///
/// # Errors
/// A program or package is missing.
pub fn all(tools: &Tools) -> Result<Vec<PathBuf>, BuildError> {
    if let Some(missing) = missing_programs() {
        return Err(missing);
    }
    let sidecars = SIDECARS.map(|(program, name)| {
        let inside = format!("/{program}");
        Recipe::new(name).with_bin(tools.path(program), &inside).with_entrypoint([inside])
    });
    let recipes = [lamina(LAMINA), image::postgres()].into_iter().chain(sidecars);
    recipes.map(|recipe| Ok(recipe.build_cached()?)).collect()
}
