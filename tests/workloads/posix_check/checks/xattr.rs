//! Extended attributes.

use rustix::fs::{
    FileType, OFlags, XattrFlags, fgetxattr, fremovexattr, fsetxattr, getxattr, getxattr_query,
    lgetxattr, link, listxattr, listxattr_query, lsetxattr, lstat, removexattr, rename, setxattr,
    symlink,
};
use rustix::io::Errno;

use super::checks;
use crate::act::*;
use crate::peer::ALICE;
use crate::verdict::*;

checks![
    a_value_is_read_back,
    values_may_be_empty_or_any_bytes,
    creation_and_replacement_can_be_demanded,
    a_missing_attribute_is_enodata,
    sizes_can_be_probed,
    a_short_buffer_is_erange,
    names_are_listed,
    names_have_a_namespace_and_a_length,
    a_value_too_large_is_e2big,
    descriptors_reach_attributes,
    user_attributes_are_for_files_and_directories,
    user_attributes_need_permission,
    trusted_attributes_are_for_the_privileged,
    security_attributes_are_for_the_privileged,
    links_have_trusted_attributes_of_their_own,
    attributes_stay_with_the_inode,
    setting_one_moves_the_change_time_only,
];

fn set(path: &str, name: &str, value: &[u8]) -> Result<(), Errno> {
    setxattr(path, name, value, XattrFlags::empty())
}

fn value(path: &str, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 70_000];
    let len = getxattr(path, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

/// The names of the namespaces that are the caller's to set, sorted.
fn listed(path: &str) -> Result<Vec<String>, Errno> {
    let mut buffer = vec![0; 70_000];
    let len = listxattr(path, &mut buffer[..])?;
    let names = buffer[..len]
        .split(|byte| *byte == 0)
        .map(|name| String::from_utf8_lossy(name).into_owned());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("user.") || name.starts_with("trusted."))
        .collect();
    names.sort();
    Ok(names)
}

fn a_value_is_read_back() -> Verdict {
    touch("f")?;
    open_directory("d")?;
    for path in ["f", "d"] {
        set(path, "user.a", b"one")?;
        set(path, "user.b", b"two")?;
        set(path, "user.a", b"three")?;
        equal(path, value(path, "user.a")?, b"three".to_vec())?;
        removexattr(path, "user.a")?;
        fails("removed", value(path, "user.a"), Errno::NODATA)?;
        equal(path, value(path, "user.b")?, b"two".to_vec())?;
    }
    Ok(())
}

fn values_may_be_empty_or_any_bytes() -> Verdict {
    touch("f")?;
    let all: Vec<u8> = (0..=255).collect();
    for bytes in [&b""[..], b"\0", b"\0\0x\0", &all] {
        set("f", "user.a", bytes)?;
        equal("value", value("f", "user.a")?, bytes.to_vec())?;
    }
    Ok(())
}

fn creation_and_replacement_can_be_demanded() -> Verdict {
    touch("f")?;
    fails(
        "replace",
        setxattr("f", "user.a", b"x", XattrFlags::REPLACE),
        Errno::NODATA,
    )?;
    setxattr("f", "user.a", b"x", XattrFlags::CREATE)?;
    fails(
        "create",
        setxattr("f", "user.a", b"y", XattrFlags::CREATE),
        Errno::EXIST,
    )?;
    setxattr("f", "user.a", b"z", XattrFlags::REPLACE)?;
    equal("value", value("f", "user.a")?, b"z".to_vec())
}

fn a_missing_attribute_is_enodata() -> Verdict {
    touch("f")?;
    fails("get", value("f", "user.a"), Errno::NODATA)?;
    fails("remove", removexattr("f", "user.a"), Errno::NODATA)
}

fn sizes_can_be_probed() -> Verdict {
    touch("f")?;
    set("f", "user.a", &[7; 300])?;
    equal("value", getxattr_query("f", "user.a")?, 300)?;
    let listed = listxattr_query("f")?;
    holds("the list has room for the name", listed >= "user.a\0".len())
}

fn a_short_buffer_is_erange() -> Verdict {
    touch("f")?;
    set("f", "user.a", &[7; 300])?;
    fails(
        "value",
        getxattr("f", "user.a", &mut [0; 299][..]),
        Errno::RANGE,
    )?;
    fails("list", listxattr("f", &mut [0; 3][..]), Errno::RANGE)?;
    equal("exact", getxattr("f", "user.a", &mut [0; 300][..])?, 300)
}

fn names_are_listed() -> Verdict {
    touch("f")?;
    equal("none", listed("f")?.len(), 0)?;
    for number in 0..40 {
        set("f", &format!("user.attribute-{number:02}"), b"v")?;
    }
    let expected: Vec<String> = (0..40)
        .map(|number| format!("user.attribute-{number:02}"))
        .collect();
    equal("names", listed("f")?, expected)
}

fn names_have_a_namespace_and_a_length() -> Verdict {
    touch("f")?;
    fails("no namespace", set("f", "name", b"x"), Errno::NOTSUP)?;
    fails(
        "unknown namespace",
        set("f", "unknown.name", b"x"),
        Errno::NOTSUP,
    )?;
    fails("empty", set("f", "", b"x"), Errno::RANGE)?;
    let longest = format!("user.{}", "n".repeat(250));
    set("f", &longest, b"x")?;
    equal("names", listed("f")?, vec![longest.clone()])?;
    fails(
        "256 bytes",
        set("f", &format!("{longest}n"), b"x"),
        Errno::RANGE,
    )
}

fn a_value_too_large_is_e2big() -> Verdict {
    touch("f")?;
    fails(
        "64 KiB and one byte",
        set("f", "user.a", &[0; 65_537]),
        Errno::TOOBIG,
    )?;
    set("f", "user.a", &[1; 3000])?;
    equal("length", value("f", "user.a")?.len(), 3000)
}

fn descriptors_reach_attributes() -> Verdict {
    let file = create("f", 0o644)?;
    fsetxattr(&file, "user.a", b"x", XattrFlags::empty())?;
    equal("length", fgetxattr(&file, "user.a", &mut [0; 10][..])?, 1)?;
    fremovexattr(&file, "user.a")?;
    let path = open_as("f", OFlags::PATH)?;
    fails(
        "path descriptor",
        fsetxattr(&path, "user.a", b"x", XattrFlags::empty()),
        Errno::BADF,
    )?;
    let directory = open_as(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    fsetxattr(&directory, "user.a", b"x", XattrFlags::empty())?;
    equal("of a directory", value(".", "user.a")?, b"x".to_vec())
}

fn user_attributes_are_for_files_and_directories() -> Verdict {
    symlink("nowhere", "symlink")?;
    node("fifo", FileType::Fifo, 0o644, 0)?;
    node("socket", FileType::Socket, 0o644, 0)?;
    node("char", FileType::CharacterDevice, 0o644, 0)?;
    for name in ["symlink", "fifo", "socket", "char"] {
        fails(
            name,
            lsetxattr(name, "user.a", b"x", XattrFlags::empty()),
            Errno::PERM,
        )?;
    }
    Ok(())
}

fn user_attributes_need_permission() -> Verdict {
    touch("f")?;
    set("f", "user.a", b"x")?;
    set_bits("f", 0o604)?;
    ALICE.run(|| {
        equal("value", value("f", "user.a")?, b"x".to_vec())?;
        fails("set", set("f", "user.a", b"y"), Errno::ACCESS)?;
        fails("remove", removexattr("f", "user.a"), Errno::ACCESS)
    })?;
    set_bits("f", 0o602)?;
    ALICE.run(|| {
        fails("get", value("f", "user.a"), Errno::ACCESS)?;
        Ok(set("f", "user.a", b"y")?)
    })
}

fn trusted_attributes_are_for_the_privileged() -> Verdict {
    touch("f")?;
    set("f", "trusted.a", b"x")?;
    equal("value", value("f", "trusted.a")?, b"x".to_vec())?;
    equal("listed", listed("f")?, vec!["trusted.a".to_owned()])?;
    ALICE.own("f")?;
    ALICE.run(|| {
        fails("get", value("f", "trusted.a"), Errno::NODATA)?;
        fails("set", set("f", "trusted.a", b"y"), Errno::PERM)?;
        equal("listed for a user", listed("f")?.len(), 0)
    })
}

fn security_attributes_are_for_the_privileged() -> Verdict {
    touch("f")?;
    ALICE.own("f")?;
    ALICE.run(|| fails("set", set("f", "security.caisson", b"y"), Errno::PERM))?;
    set("f", "security.caisson", b"x")?;
    ALICE.run(|| equal("value", value("f", "security.caisson")?, b"x".to_vec()))
}

fn links_have_trusted_attributes_of_their_own() -> Verdict {
    touch("f")?;
    symlink("f", "s")?;
    lsetxattr("s", "trusted.a", b"link", XattrFlags::empty())?;
    equal("length", lgetxattr("s", "trusted.a", &mut [0; 10][..])?, 4)?;
    fails("the target", value("s", "trusted.a"), Errno::NODATA)
}

fn attributes_stay_with_the_inode() -> Verdict {
    touch("f")?;
    set("f", "user.a", b"x")?;
    rename("f", "g")?;
    link("g", "h")?;
    equal("after a rename", value("g", "user.a")?, b"x".to_vec())?;
    set("h", "user.a", b"y")?;
    equal("by another name", value("g", "user.a")?, b"y".to_vec())
}

fn setting_one_moves_the_change_time_only() -> Verdict {
    touch("f")?;
    let before = lstat("f")?;
    tick()?;
    set("f", "user.a", b"x")?;
    let after = lstat("f")?;
    holds("the change time moved", changed(&after) > changed(&before))?;
    equal("modification time", modified(&after), modified(&before))
}
