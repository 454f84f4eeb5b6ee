//! The archive format that the kernel unpacks: "newc" cpio, uncompressed.
//!
//! Contract: entries appear in the order in which they are added, owned by root, dated 1970, numbered from 1.
//! Spec: kernel Documentation/driver-api/early-userspace/buffer-format.rst.

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive that is being written, in memory.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// What cannot be put into an archive.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// Sizes are 32-bit numbers.
    #[error("{name}: too large for a cpio archive")]
    TooLarge {
        /// The entry.
        name: String,
    },
}

/// What differs between kinds of entries.
#[derive(Default)]
struct Header {
    mode: u32,
    links: u32,
    device: (u32, u32),
}

impl Archive {
    /// Adds a directory. Parents come first.
    pub fn directory(&mut self, name: &str, permissions: u32) -> Result<(), CpioError> {
        let header = Header {
            mode: S_IFDIR | permissions,
            links: 2,
            ..Header::default()
        };
        self.entry(name, &header, &[])
    }

    /// Adds a regular file.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<(), CpioError> {
        let header = Header {
            mode: S_IFREG | permissions,
            links: 1,
            ..Header::default()
        };
        self.entry(name, &header, content)
    }

    /// Adds a character device node.
    pub fn device(
        &mut self,
        name: &str,
        permissions: u32,
        device: (u32, u32),
    ) -> Result<(), CpioError> {
        self.entry(
            name,
            &Header {
                mode: S_IFCHR | permissions,
                links: 1,
                device,
            },
            &[],
        )
    }

    /// The finished archive.
    pub fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.entries = 0;
        self.write(
            TRAILER,
            0,
            &Header {
                links: 1,
                ..Header::default()
            },
            &[],
        )?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, header: &Header, content: &[u8]) -> Result<(), CpioError> {
        self.entries += 1;
        self.write(name, self.entries, header, content)
    }

    fn write(
        &mut self,
        name: &str,
        inode: u32,
        header: &Header,
        content: &[u8],
    ) -> Result<(), CpioError> {
        let too_large = |_| CpioError::TooLarge {
            name: name.to_owned(),
        };
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        let (major, minor) = header.device;
        let (uid, gid, time, archive_major, archive_minor, checksum) = (0, 0, 0, 0, 0, 0);
        let fields = [
            inode,
            header.mode,
            uid,
            gid,
            header.links,
            time,
            size,
            archive_major,
            archive_minor,
            major,
            minor,
            name_size,
            checksum,
        ];
        self.bytes.extend(MAGIC.bytes());
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
        Ok(())
    }

    /// Names and contents start at multiples of four.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"abcde").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let header = "0707010000000100008 1ed".replace(' ', "");
        assert!(text.starts_with(&header), "{text}");
        assert_eq!(&text[54..62], "00000005", "the size");
        assert_eq!(&text[94..102], "00000005", "the name's size, with its end");
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"abcde");
        assert_eq!(&text[124..130], MAGIC);
        assert!(text.trim_end_matches('\0').ends_with(TRAILER));
        assert_eq!(bytes.len() % 4, 0);
    }
}
