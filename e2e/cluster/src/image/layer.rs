//! The one layer of an image: assembled in a temporary folder, then packed in sorted order with all times 0.
//!
//! Invariant: the packed bytes depend on names, modes, owners, links and contents only. Device nodes and sockets are left out.

use std::collections::BTreeSet;
use std::fs::{Metadata, Permissions};
use std::io::Cursor;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::host::{HostError, at, run, write};

use super::debian::{BUSYBOX, Packages};
use super::{ImageError, Recipe};

/// A packed layer: an uncompressed tar in memory (a few hundred MiB at most: the PostgreSQL image has some 100).
pub(super) struct Layer {
    pub(super) tar: Vec<u8>,
}

impl Layer {
    pub(super) fn assemble(recipe: &Recipe, packages: &Packages) -> Result<Self, ImageError> {
        let folder = Folder::make()?;
        let root = folder.0.as_path();
        packages.unpack(root)?;
        if recipe.busybox {
            link_busybox(root)?;
        }
        trim(root)?;
        write_base(root, recipe)?;
        for (from, to) in &recipe.bins {
            let to = below(root, to);
            make_parent(&to)?;
            at(from, std::fs::copy(from, &to))?;
            at(&to, std::fs::set_permissions(&to, Permissions::from_mode(0o755)))?;
        }
        for (to, text) in &recipe.texts {
            write(&below(root, to), text)?;
        }
        for (path, mode, owner) in &recipe.folders {
            let path = below(root, path);
            at(&path, std::fs::create_dir_all(&path))?;
            at(&path, std::os::unix::fs::chown(&path, Some(*owner), Some(*owner)))?;
            at(&path, std::fs::set_permissions(&path, Permissions::from_mode(*mode)))?;
        }
        Ok(Self { tar: pack(root)? })
    }
}

/// A temporary folder that goes when dropped.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self, HostError> {
        let path = run(&["mktemp", "-d", "--tmpdir", "lamina-image.XXXXXX"])?;
        let path = PathBuf::from(path.trim());
        at(&path, std::fs::set_permissions(&path, Permissions::from_mode(0o755)))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// `/etc/passwd` and the like, and the folders that programs expect.
fn write_base(root: &Path, recipe: &Recipe) -> Result<(), HostError> {
    let mut passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n".to_owned();
    let mut group = "root:x:0:\nnogroup:x:65534:\n".to_owned();
    for (name, number) in &recipe.users {
        passwd += &format!("{name}:x:{number}:{number}:{name}:/var/lib/{name}:/bin/sh\n");
        group += &format!("{name}:x:{number}:\n");
    }
    write(&root.join("etc/passwd"), &passwd)?;
    write(&root.join("etc/group"), &group)?;
    write(&root.join("etc/nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files dns\n")?;
    for (folder, mode) in [
        ("tmp", 0o1777),
        ("run", 0o755),
        ("root", 0o700),
        ("var/tmp", 0o1777),
        ("proc", 0o555),
        ("sys", 0o555),
        ("dev", 0o755),
    ] {
        let path = root.join(folder);
        at(&path, std::fs::create_dir_all(&path))?;
        at(&path, std::fs::set_permissions(&path, Permissions::from_mode(mode)))?;
    }
    let run_link = root.join("var/run");
    if run_link.symlink_metadata().is_err() {
        at(&run_link, symlink("../run", &run_link))?;
    }
    Ok(())
}

/// A link for each tool of busybox that no package brings; found in `/usr/bin` and `/usr/sbin`, which come first in PATH, so
/// that busybox never shadows a real `mount` or `losetup`.
fn link_busybox(root: &Path) -> Result<(), ImageError> {
    let program = root.join("usr/bin/busybox");
    if !program.exists() {
        return Err(ImageError::NotInPackage { package: BUSYBOX, path: PathBuf::from("/bin/busybox") });
    }
    // busybox's own shell takes its built-in tools before any in PATH, so a real shell goes first.
    let (dash, shell) = (root.join("usr/bin/dash"), root.join("usr/bin/sh"));
    if dash.exists() && shell.symlink_metadata().is_err() {
        at(&shell, symlink("dash", &shell))?;
    }
    let tools = run(&[&program.display().to_string(), "--list"])?;
    for tool in tools.lines().filter(|tool| *tool != "busybox") {
        let taken = ["usr/bin", "usr/sbin"].iter().any(|dir| root.join(dir).join(tool).symlink_metadata().is_ok());
        if !taken {
            let link = root.join("usr/bin").join(tool);
            at(&link, symlink("busybox", &link))?;
        }
    }
    Ok(())
}

/// Leaves out what no program reads at run time.
fn trim(root: &Path) -> Result<(), HostError> {
    for folder in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/lintian",
        "usr/share/bug",
        "usr/share/info",
        "usr/share/bash-completion",
        "usr/lib/x86_64-linux-gnu/gconv",
        "usr/lib/postgresql/15/lib/bitcode",
    ] {
        let path = root.join(folder);
        if path.exists() {
            at(&path, std::fs::remove_dir_all(&path))?;
        }
    }
    Ok(())
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn make_parent(path: &Path) -> Result<(), HostError> {
    let parent = path.parent().expect("a path below the image's root");
    at(parent, std::fs::create_dir_all(parent))
}

fn pack(root: &Path) -> Result<Vec<u8>, HostError> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut names = BTreeSet::new();
    list(root, Path::new(""), &mut names)?;
    for name in names {
        at(&name, append(&mut builder, root, &name))?;
    }
    at(root, builder.into_inner())
}

fn list(root: &Path, name: &Path, into: &mut BTreeSet<PathBuf>) -> Result<(), HostError> {
    let folder = root.join(name);
    for entry in at(&folder, std::fs::read_dir(&folder))? {
        let entry = at(&folder, entry)?;
        let name = name.join(entry.file_name());
        if at(&entry.path(), entry.file_type())?.is_dir() {
            list(root, &name, into)?;
        }
        into.insert(name);
    }
    Ok(())
}

fn append(builder: &mut tar::Builder<Vec<u8>>, root: &Path, name: &Path) -> std::io::Result<()> {
    let path = root.join(name);
    let meta = path.symlink_metadata()?;
    let mut header = header(&meta);
    let kind = meta.file_type();
    if kind.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        builder.append_link(&mut header, name, std::fs::read_link(&path)?)
    } else if kind.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        builder.append_data(&mut header, name, Cursor::new([]))
    } else if kind.is_file() {
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(meta.len());
        builder.append_data(&mut header, name, std::fs::File::open(&path)?)
    } else {
        Ok(())
    }
}

fn header(meta: &Metadata) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(u64::from(meta.uid()));
    header.set_gid(u64::from(meta.gid()));
    header.set_mtime(0);
    header.set_size(0);
    header
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_pack_to_the_same_bytes() {
        let packed = |order: [&str; 2]| {
            let dir = tempfile::tempdir().unwrap();
            for name in order {
                std::fs::create_dir_all(dir.path().join("d")).unwrap();
                std::fs::write(dir.path().join("d").join(name), name).unwrap();
            }
            symlink("d/a", dir.path().join("link")).unwrap();
            pack(dir.path()).unwrap()
        };
        let first = packed(["a", "b"]);
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(first, packed(["b", "a"]));
    }
}
