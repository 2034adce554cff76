//! Debian packages: what a list of names needs, fetched once with apt, files read with dpkg-deb.
//!
//! apt resolves against an empty list of installed packages, so the answer does not depend on this machine.
//!
//! Invariant: nothing is installed and no state of the machine's own apt or dpkg changes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::host::{HostError, at, run, write};

use super::{ImageError, hex};

/// The package of the static busybox.
pub(super) const BUSYBOX: &str = "busybox-static";

/// Fetched packages, in the order of their names.
#[derive(Debug)]
pub(super) struct Packages {
    files: Vec<PathBuf>,
}

impl Packages {
    /// Resolves names with their dependencies, leaves out what `without` says and fetches the rest into `cache`.
    pub(super) fn resolve(cache: &Path, names: &[String], without: &[String]) -> Result<Self, ImageError> {
        if names.is_empty() {
            return Ok(Self { files: Vec::new() });
        }
        let archives = cache.join("archives");
        at(&archives, std::fs::create_dir_all(archives.join("partial")))?;
        write(&cache.join("none-installed"), "")?;
        let files = fetched(cache, &archives, names, without).or_else(|_| {
            // The machine's lists may name versions that the archive has replaced since.
            run(&["apt-get", "-qq", "update"])?;
            fetched(cache, &archives, names, without)
        })?;
        Ok(Self { files })
    }

    /// The package files.
    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Unpacks all into one folder that has Debian's merged `/usr`.
    pub(super) fn unpack(&self, root: &Path) -> Result<(), HostError> {
        for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            at(root, std::fs::create_dir_all(root.join(target)))?;
            at(root, std::os::unix::fs::symlink(target, root.join(link)))?;
        }
        for file in &self.files {
            // Packages still name /bin and /lib; tar must go through the links instead of replacing them.
            let script =
                "dpkg-deb --fsys-tarfile \"$1\" | tar -x -p --keep-directory-symlink --numeric-owner -C \"$2\"";
            run(&["sh", "-c", script, "unpack", &file.display().to_string(), &root.display().to_string()])?;
        }
        Ok(())
    }
}

/// The files of the planned packages, fetched where they are missing, in the order of their names.
fn fetched(cache: &Path, archives: &Path, names: &[String], without: &[String]) -> Result<Vec<PathBuf>, HostError> {
    let mut plan = plan(cache, names)?;
    plan.retain(|item| !without.iter().any(|pattern| matches(pattern, &item.name)));
    let missing: Vec<&Planned> = plan.iter().filter(|item| !archives.join(&item.file).exists()).collect();
    fetch(archives, &missing)?;
    let mut files: Vec<PathBuf> = plan.iter().map(|item| archives.join(&item.file)).collect();
    files.sort();
    Ok(files)
}

struct Planned {
    name: String,
    version: String,
    file: String,
}

const LISTS: &str = "/var/lib/apt/lists";

/// What apt would install on an empty machine. Asking takes seconds, so the answer is kept until apt learns something new.
fn plan(cache: &Path, names: &[String]) -> Result<Vec<Planned>, HostError> {
    let key = hex(&Sha256::digest(names.join(" ")));
    let kept = cache.join(format!("plan-{}", &key[..16]));
    let changed = |path: &Path| path.metadata().and_then(|meta| meta.modified()).ok();
    let text = match (changed(&kept), changed(Path::new(LISTS))) {
        (Some(kept_at), Some(lists_at)) if kept_at > lists_at => at(&kept, std::fs::read_to_string(&kept))?,
        _ => {
            let text = ask(cache, names).or_else(|_| {
                // A fresh machine has no lists yet.
                run(&["apt-get", "-qq", "update"])?;
                ask(cache, names)
            })?;
            write(&kept, &text)?;
            text
        }
    };
    Ok(text.lines().filter_map(read_plan).collect())
}

/// Lines `'URI' FILE SIZE HASH`.
fn ask(cache: &Path, names: &[String]) -> Result<String, HostError> {
    let status = format!("Dir::State::status={}", cache.join("none-installed").display());
    // An empty folder for archives: apt does not print what it has already.
    let empty = cache.join("empty");
    at(&empty, std::fs::create_dir_all(empty.join("partial")))?;
    let archives = format!("Dir::Cache::archives={}", empty.display());
    let mut words = vec!["apt-get", "-qq", "--print-uris", "--yes", "--no-install-recommends"];
    words.extend(["-o", &status, "-o", &archives, "-o", "Debug::NoLocking=true", "install"]);
    words.extend(names.iter().map(String::as_str));
    run(&words)
}

fn read_plan(line: &str) -> Option<Planned> {
    let file = line.split_whitespace().nth(1)?;
    let mut parts = file.strip_suffix(".deb")?.rsplitn(3, '_').skip(1);
    let version = parts.next()?.replace("%3a", ":");
    Some(Planned { name: parts.next()?.to_owned(), version, file: file.to_owned() })
}

/// Downloads into `archives`; `apt-get download` neither locks nor installs. Over 2 s it says so.
fn fetch(archives: &Path, missing: &[&Planned]) -> Result<(), HostError> {
    if missing.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    eprintln!("fetching {} Debian packages", missing.len());
    let exact: Vec<String> = missing.iter().map(|item| format!("{}={}", item.name, item.version)).collect();
    // Into a folder of its own and renamed, so that a broken download is never taken for a package.
    let part = archives.join(format!("fetch-{}", std::process::id()));
    at(&part, std::fs::create_dir_all(&part))?;
    let script = "cd \"$0\" && apt-get -qq -o APT::Sandbox::User=root download \"$@\"";
    let folder = part.display().to_string();
    let words: Vec<&str> = ["sh", "-c", script, &folder].into_iter().chain(exact.iter().map(String::as_str)).collect();
    let fetched = run(&words);
    for entry in at(&part, std::fs::read_dir(&part))?.flatten().filter(|_| fetched.is_ok()) {
        at(&part, std::fs::rename(entry.path(), archives.join(entry.file_name())))?;
    }
    at(&part, std::fs::remove_dir_all(&part))?;
    eprintln!("fetched in {:.1} s", start.elapsed().as_secs_f64());
    fetched.map(drop)
}

/// `*` stands for any text, at one or both ends or in the middle.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_apts_plan_gives_name_version_and_file() {
        let line = "'http://h/pool/z/zlib1g_1.2.13.dfsg-1_amd64.deb' zlib1g_1%3a1.2.13.dfsg-1_amd64.deb 86664 MD5Sum:x";
        let planned = read_plan(line).unwrap();
        assert_eq!((planned.name.as_str(), planned.version.as_str()), ("zlib1g", "1:1.2.13.dfsg-1"));
        assert_eq!(planned.file, "zlib1g_1%3a1.2.13.dfsg-1_amd64.deb");
        assert!(read_plan("E: no such package").is_none());
    }

    #[test]
    fn patterns_match_at_both_ends() {
        assert!(matches("perl*", "perl-base") && matches("lib*-perl", "libjson-perl") && matches("ucf", "ucf"));
        assert!(!matches("perl*", "libperl5.36") && !matches("lib*-perl", "lib-p") && !matches("ucf", "ucfx"));
    }
}
