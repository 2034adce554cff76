//! Container images without a registry and without a daemon: a recipe becomes an OCI-layout tar with one uncompressed layer.
//!
//! Parts: busybox (static), files of the machine, Debian packages with their dependencies. A built image is kept under the hash
//! of everything that went into it, so a second build only looks.
//!
//! Invariant: the same recipe over the same bytes gives the same tar, byte for byte: entries are sorted, times are 0.

mod debian;
mod layer;
mod oci;

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::host::HostError;
use crate::layout::cache_dir;

/// The image that every pod's sandbox runs.
pub const PAUSE: &str = "lamina.dev/pause:1";
/// A shell and small tools.
pub const BUSYBOX: &str = "lamina.dev/busybox:1";
/// PostgreSQL 15 with pgbench and `pg_amcheck`.
pub const POSTGRES: &str = "lamina.dev/postgres:15";
/// fio and a shell.
pub const FIO: &str = "lamina.dev/fio:3";
/// File system tools for storage programs.
pub const STORAGE: &str = "lamina.dev/storage-tools:1";

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program failed or a file cannot be read or written.
    #[error(transparent)]
    Host(#[from] HostError),
    /// `--bin` without a destination.
    #[error("{0} is not PATH:DEST with an absolute DEST")]
    NotABin(String),
    /// No cache folder is known.
    #[error("none of LAMINA_CACHE, XDG_CACHE_HOME and HOME is set: nowhere to keep images")]
    NoCache,
    /// Debian's package has no file that the recipe needs.
    #[error("the package {package} has no {path}")]
    NotInPackage {
        /// Which package.
        package: &'static str,
        /// Which file.
        path: PathBuf,
    },
}

/// What goes into an image.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Recipe {
    name: String,
    busybox: bool,
    bins: Vec<(PathBuf, PathBuf)>,
    texts: Vec<(PathBuf, String)>,
    folders: Vec<(PathBuf, u32, u32)>,
    debs: Vec<String>,
    without: Vec<String>,
    users: Vec<(String, u32)>,
    env: Vec<(String, String)>,
    entrypoint: Vec<String>,
    run_as: Option<String>,
}

impl Recipe {
    /// An empty image called `name`, with tag.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// The same under another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// The image's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// With busybox and a link in `/bin` for each of its tools that no package brings.
    #[must_use]
    pub fn with_busybox(mut self) -> Self {
        self.busybox = true;
        self
    }

    /// With a file of the machine at an absolute path, mode 0755.
    #[must_use]
    pub fn with_bin(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.bins.push((from.into(), to.into()));
        self
    }

    /// As [`Recipe::with_bin`], from `PATH:DEST`.
    ///
    /// # Errors
    /// The text is not of that form.
    pub fn with_bin_text(self, text: &str) -> Result<Self, ImageError> {
        match text.rsplit_once(':') {
            Some((from, to)) if !from.is_empty() && to.starts_with('/') => Ok(self.with_bin(from, to)),
            _ => Err(ImageError::NotABin(text.to_owned())),
        }
    }

    /// With a small text file, mode 0644.
    #[must_use]
    pub fn with_text(mut self, to: impl Into<PathBuf>, text: &str) -> Self {
        self.texts.push((to.into(), text.to_owned()));
        self
    }

    /// With an empty folder of this mode and owner (user and group number).
    #[must_use]
    pub fn with_folder(mut self, path: impl Into<PathBuf>, mode: u32, owner: u32) -> Self {
        self.folders.push((path.into(), mode, owner));
        self
    }

    /// With Debian packages and what they depend on (no recommendations).
    #[must_use]
    pub fn with_debs<S: Into<String>>(mut self, packages: impl IntoIterator<Item = S>) -> Self {
        self.debs.extend(packages.into_iter().map(Into::into));
        self
    }

    /// Without these packages, though others depend on them; `name*` leaves out all that begin so.
    #[must_use]
    pub fn without_debs<S: Into<String>>(mut self, packages: impl IntoIterator<Item = S>) -> Self {
        self.without.extend(packages.into_iter().map(Into::into));
        self
    }

    /// With a user and a group of this name and number.
    #[must_use]
    pub fn with_user(mut self, name: &str, number: u32) -> Self {
        self.users.push((name.to_owned(), number));
        self
    }

    /// With a variable.
    #[must_use]
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs this by default.
    #[must_use]
    pub fn with_entrypoint<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.entrypoint = argv.into_iter().map(Into::into).collect();
        self
    }

    /// Runs as this user by default.
    #[must_use]
    pub fn with_run_as(mut self, user: &str) -> Self {
        self.run_as = Some(user.to_owned());
        self
    }

    /// Builds the image, or finds it built: its path in the cache.
    ///
    /// # Errors
    /// A package or file is not to be had, or the cache cannot be written.
    pub fn build_cached(&self) -> Result<PathBuf, ImageError> {
        let cache = cache_dir().ok_or(ImageError::NoCache)?;
        let packages = debian::Packages::resolve(&cache.join("debian"), &self.all_debs(), &self.without)?;
        let tar = cache.join("images").join(format!("{}.tar", self.key(&packages)?));
        if !tar.exists() {
            let layer = layer::Layer::assemble(self, &packages)?;
            oci::write(&tar, self, &layer)?;
        }
        Ok(tar)
    }

    /// Builds the image to a path of one's own.
    ///
    /// # Errors
    /// As [`Recipe::build_cached`]; the path cannot be written.
    pub fn build(&self, to: &Path) -> Result<(), ImageError> {
        let built = self.build_cached()?;
        crate::host::at(to, std::fs::copy(&built, to))?;
        Ok(())
    }

    fn all_debs(&self) -> Vec<String> {
        let busybox = self.busybox.then(|| debian::BUSYBOX.to_owned());
        self.debs.iter().cloned().chain(busybox).collect()
    }

    /// Hash of everything that goes in.
    fn key(&self, packages: &debian::Packages) -> Result<String, ImageError> {
        let mut hash = Sha256::new();
        hash.update(FORMAT);
        hash.update(serde_json::to_vec(self).expect("texts and numbers are JSON"));
        for package in packages.files() {
            hash.update(package.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update([0]);
        }
        for (from, _) in &self.bins {
            let mut file = crate::host::at(from, std::fs::File::open(from))?;
            crate::host::at(from, std::io::copy(&mut file, &mut hash))?;
        }
        Ok(hex(&hash.finalize())[..32].to_owned())
    }
}

/// Changes when the same recipe gives another tar.
const FORMAT: &[u8] = b"lamina image 3";

/// The sandbox image: sleeps.
#[must_use]
pub fn pause() -> Recipe {
    Recipe::new(PAUSE).with_busybox().with_entrypoint(["/bin/sleep", "2147483647"])
}

/// A shell and small tools.
#[must_use]
pub fn busybox() -> Recipe {
    Recipe::new(BUSYBOX).with_busybox().with_entrypoint(["/bin/sh"])
}

/// PostgreSQL 15 with its contributed programs, user `postgres` (number 999), locale C only. `postgresql-common` with its perl,
/// JIT compilation with its LLVM, and what only serves installing are left out.
#[must_use]
pub fn postgres() -> Recipe {
    let not_needed = [
        "perl*",
        "libperl*",
        "lib*-perl",
        "postgresql-common",
        "postgresql-client-common",
        "libllvm*",
        "libz3-*",
        "locales",
        "libc-l10n",
        "ssl-cert",
        "openssl",
        "usrmerge",
        "debconf",
        "ucf",
        "debianutils",
    ];
    let path = "/usr/lib/postgresql/15/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    Recipe::new(POSTGRES)
        .without_debs(installing())
        .with_busybox()
        .with_debs(["postgresql-15", "dash"])
        .without_debs(not_needed)
        .with_user("postgres", 999)
        .with_folder("/var/run/postgresql", 0o2775, 999)
        .with_folder("/var/lib/postgresql", 0o755, 999)
        .with_env("PATH", path)
        .with_env("LC_ALL", "C")
        .with_run_as("999:999")
        .with_entrypoint(["postgres"])
}

/// e2fsprogs, xfsprogs, mount, losetup and busybox: the base of the storage programs' images.
#[must_use]
pub fn storage_tools() -> Recipe {
    Recipe::new(STORAGE)
        .with_busybox()
        .with_debs(["e2fsprogs", "xfsprogs", "util-linux", "mount", "dash"])
        .without_debs(installing())
        // xfs_scrub and what runs it need these; we do not run it.
        .without_debs(["python3*", "libpython3*", "libicu*", "libsqlite3-*", "media-types"])
        .with_env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .with_entrypoint(["/bin/sh"])
}

/// fio, which checks what it reads back, and busybox. Its plotting programs need python, which is left out.
#[must_use]
pub fn fio() -> Recipe {
    Recipe::new(FIO)
        .with_busybox()
        .with_debs(["fio", "dash"])
        .without_debs(installing())
        .without_debs(["python3*", "libpython3*", "media-types", "debconf", "ca-certificates", "openssl"])
        .with_env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .with_entrypoint(["/bin/sh"])
}

/// Packages that only serve installing others.
fn installing() -> [&'static str; 8] {
    ["dpkg", "tar", "perl-base", "adduser", "init-system-helpers", "sysvinit-utils", "lsb-base", "sensible-utils"]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_bin_needs_a_source_and_an_absolute_destination() {
        assert!(Recipe::new("a:1").with_bin_text("/x/y:/bin/y").is_ok());
        for text in ["/x/y", ":/bin/y", "/x/y:bin/y", ""] {
            assert!(matches!(Recipe::new("a:1").with_bin_text(text), Err(ImageError::NotABin(_))), "{text}");
        }
    }
}
