// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/u-root/uio/uio"
	"github.com/ulikunitz/xz"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// Where a guest's own programs are.
const (
	guestBin = "/usr/local/bin"
	program  = guestBin + "/plimsoll"
)

// Programs are what a guest runs of ours, as files of this host: statically linked.
type Programs struct {
	Plimsoll  string
	KubeProxy string // empty for none
}

// tools are commands of this host that the modes use, and what they read.
var (
	tools = []string{"xtables-nft-multi", "xtables-legacy-multi", "nft", "ipset", "kmod", "sh"}
	// ipset asks by name for protocols.
	readFiles = []string{"/etc/protocols"}
	// Plug-ins of iptables, which no program's own list of libraries names.
	plugins = []string{"/usr/lib/*/xtables/lib*.so", "/usr/lib64/xtables/lib*.so", "/usr/lib/xtables/lib*.so"}
	// Folders of modules. Hand-picked lists miss some: modules ask for others by aliases.
	moduleDirs = []string{"kernel/net", "kernel/lib", "kernel/crypto", "kernel/arch", "kernel/drivers/net", "kernel/drivers/firmware"}
	// What is left out of them: drivers of hardware.
	notModules = []string{"kernel/drivers/net/ethernet", "kernel/drivers/net/hyperv", "kernel/drivers/net/wireless", "kernel/drivers/net/wwan", "kernel/drivers/net/xen-netback", "kernel/arch/x86/kvm", "kernel/arch/x86/events"}
)

// BuildInitramfs writes what a guest boots from into cache, once for each kernel, programs and tools, and returns the file. It needs no root.
// Errors wrap clusters.ErrNotSupported where this host lacks a tool.
func BuildInitramfs(ctx context.Context, cache string, kernel Kernel, programs Programs, report func(string)) (file string, err error) {
	a := &archive{placed: make(map[string]bool)}
	if err := a.collect(programs); err != nil {
		return "", err
	}
	key, err := a.key(kernel)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "initramfs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	file = filepath.Join(dir, kernel.Release+"-"+key+".cpio")
	now := time.Now()
	if err := os.Chtimes(file, now, now); err == nil { // when it was used last
		return file, nil
	}
	report("writing the guests' initramfs")
	if err := removeOld(dir); err != nil {
		return "", err
	}
	if err := a.addModules(ctx, dir, kernel); err != nil {
		return "", err
	}
	temporary, err := os.CreateTemp(dir, ".writing-")
	if err != nil {
		return "", err
	}
	defer os.Remove(temporary.Name()) // gone already if all goes well
	if err := errors.Join(a.write(temporary), temporary.Close()); err != nil {
		return "", fmt.Errorf("write the initramfs: %w", err)
	}
	return file, os.Rename(temporary.Name(), file)
}

// keepFor is how long an archive is kept that nobody uses: each build of plimsoll makes another one, of some 300 MB, and another run may be
// at work with it.
const keepFor = 3 * time.Hour

func removeOld(dir string) error {
	for _, pattern := range []string{"*.cpio", ".writing-*", ".modules-*"} { // the latter of runs that were killed
		old, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, f := range old {
			if info, err := os.Stat(f); err != nil || time.Since(info.ModTime()) < keepFor {
				continue
			}
			if err := os.RemoveAll(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// An archive is what an initramfs is made of.
type archive struct {
	records []cpio.Record
	files   []hostFile
	placed  map[string]bool
}

// A hostFile goes from this host to the guest.
type hostFile struct{ from, to string }

// collect finds the files of this host that the guest is to have, in a fixed order.
func (a *archive) collect(programs Programs) error {
	a.files = []hostFile{{programs.Plimsoll, program}}
	if programs.KubeProxy != "" {
		a.files = append(a.files, hostFile{programs.KubeProxy, guestBin + "/kube-proxy"})
	}
	var elves []string
	for _, tool := range tools {
		found, err := lookUp(tool)
		if err != nil {
			return err
		}
		elves = append(elves, found)
	}
	for _, pattern := range plugins {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		elves = append(elves, found...)
	}
	for _, f := range elves {
		if err := a.addProgram(f); err != nil {
			return err
		}
	}
	for _, f := range readFiles {
		a.files = append(a.files, hostFile{f, f})
	}
	return nil
}

// lookUp finds a command, in the system's folders, too, which a user's PATH often lacks.
func lookUp(tool string) (string, error) {
	for _, name := range []string{tool, "/usr/sbin/" + tool, "/sbin/" + tool} {
		if found, err := exec.LookPath(name); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("guests need %s (plimsoll doctor --install --with guest): %w", tool, clusters.ErrNotSupported)
}

// addProgram adds a program or library at its own path, with the libraries that it wants.
func (a *archive) addProgram(file string) error {
	to := file
	if !strings.HasPrefix(to, "/usr/") && !strings.HasPrefix(to, "/opt/") {
		to = "/usr" + to // where /bin and /lib lead to
	}
	if a.placed[to] {
		return nil
	}
	a.placed[to] = true
	a.files = append(a.files, hostFile{file, to})
	libraries, err := wantedLibraries(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, l := range libraries {
		if err := a.addProgram(l); err != nil {
			return err
		}
	}
	return nil
}

// libraryDirs are where the dynamic linker looks without a cache of its own.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"}

// wantedLibraries are the interpreter and the libraries that a file asks for, as files of this host.
func wantedLibraries(file string) (all []string, err error) {
	e, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer e.Close()
	if s := e.Section(".interp"); s != nil {
		b, err := s.Data()
		if err != nil {
			return nil, err
		}
		all = append(all, string(bytes.TrimRight(b, "\x00")))
	}
	names, err := e.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		i := slices.IndexFunc(libraryDirs, func(dir string) bool {
			_, err := os.Stat(filepath.Join(dir, name))
			return err == nil
		})
		if i < 0 {
			return nil, fmt.Errorf("its library %s is not in %v", name, libraryDirs)
		}
		all = append(all, filepath.Join(libraryDirs[i], name))
	}
	return all, nil
}

// key is a hash of all that the archive is made of.
func (a *archive) key(kernel Kernel) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, archiveVersion, kernel.Release, moduleDirs, notModules)
	for _, f := range a.files {
		fmt.Fprintln(sum, f.to)
		if err := copyFile(sum, f.from); err != nil {
			return "", err
		}
	}
	err := kernel.eachModule(func(file, name string) error {
		fmt.Fprintln(sum, name)
		return copyFile(sum, file)
	})
	return hex.EncodeToString(sum.Sum(nil)[:8]), err
}

// archiveVersion changes with what write adds of its own.
const archiveVersion = 1

func copyFile(to io.Writer, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(to, f)
	return err
}

// addModules adds the kernel's modules, and the lists by which modprobe finds them. They are unpacked, for a guest would take long for it. dir is
// for what is in between.
func (a *archive) addModules(ctx context.Context, dir string, kernel Kernel) (err error) {
	if kernel.Modules == "" {
		return nil // all is built in
	}
	tree, err := os.MkdirTemp(dir, ".modules-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tree))
		}
	}()
	target := filepath.Join("lib/modules", kernel.Release)
	err = kernel.eachModule(func(file, name string) error { return unpackModule(file, filepath.Join(tree, target, name)) })
	if err != nil {
		return err
	}
	for _, name := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if b, err := os.ReadFile(filepath.Join(kernel.Modules, name)); err == nil {
			if err := os.WriteFile(filepath.Join(tree, target, name), b, 0o644); err != nil {
				return err
			}
		}
	}
	depmod, err := lookUp("depmod")
	if err != nil {
		return err
	}
	if err := host.Quietly(exec.CommandContext(ctx, depmod, "-b", tree, kernel.Release)); err != nil {
		return err
	}
	err = filepath.WalkDir(tree, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(tree, file)
		a.records = append(a.records, cpio.StaticFile("usr/"+name, string(b), 0o644))
		return err
	})
	return errors.Join(err, os.RemoveAll(tree))
}

// eachModule calls f with each file of the kernel's that guests are to have, and its name below the modules' folder.
func (k Kernel) eachModule(f func(file, name string) error) error {
	if k.Modules == "" {
		return nil
	}
	for _, d := range moduleDirs {
		err := filepath.WalkDir(filepath.Join(k.Modules, d), func(file string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			} else if err != nil {
				return err
			}
			name, err := filepath.Rel(k.Modules, file)
			if err != nil {
				return err
			}
			if !entry.IsDir() {
				return f(file, name)
			}
			if slices.Contains(notModules, name) {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("modules: %w", err)
		}
	}
	return nil
}

// unpackModule writes a module uncompressed, under its name without the compression's suffix. What is no module is left out.
func unpackModule(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	var r io.Reader = f
	switch ext := filepath.Ext(from); ext {
	case ".ko":
	case ".xz":
		r, err = xz.NewReader(f)
		to = strings.TrimSuffix(to, ext)
	case ".gz":
		r, err = gzip.NewReader(f)
		to = strings.TrimSuffix(to, ext)
	case ".zst":
		var d *zstd.Decoder
		if d, err = zstd.NewReader(f); err == nil {
			defer d.Close()
			r = d
		}
		to = strings.TrimSuffix(to, ext)
	default:
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, r)
	if err = errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return nil
}

// write writes the archive, the same bytes for the same content.
func (a *archive) write(to io.Writer) error {
	all := []cpio.Record{
		cpio.CharDev("dev/console", 0o600, 5, 1), // before init can mount anything
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.Symlink("init", program),
	}
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		all = append(all, cpio.Symlink(name, "usr/"+name))
	}
	for _, name := range []string{"modprobe", "insmod", "lsmod"} {
		all = append(all, cpio.Symlink("usr/sbin/"+name, "/usr/bin/kmod"))
	}
	for _, d := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "sys", "run", "tmp", "root", "etc", "var/run", "var/lock"} {
		all = append(all, cpio.Directory(d, 0o755))
	}
	all = append(all, a.records...)
	for _, f := range a.files {
		all = append(all, cpio.Record{
			ReaderAt: uio.NewLazyFile(f.from), // read when it is written: the archive is large
			Info:     cpio.Info{Name: strings.TrimPrefix(f.to, "/"), Mode: cpio.S_IFREG | 0o755, FileSize: sizeOf(f.from)},
		})
	}
	all = withFolders(all)
	w := cpio.Newc.Writer(to)
	for i, r := range all {
		r = cpio.MakeReproducible(r)
		r.Ino = uint64(i + 1)
		if err := w.WriteRecord(r); err != nil { // which closes its file
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	return cpio.WriteTrailer(w)
}

// withFolders puts the folders before what is in them, each once.
func withFolders(all []cpio.Record) []cpio.Record {
	var out []cpio.Record
	seen := make(map[string]bool)
	var enter func(dir string)
	enter = func(dir string) {
		if dir == "." || seen[dir] {
			return
		}
		enter(path.Dir(dir))
		seen[dir] = true
		out = append(out, cpio.Directory(dir, 0o755))
	}
	for _, r := range all {
		enter(path.Dir(r.Name))
		if seen[r.Name] {
			continue
		}
		seen[r.Name] = true
		out = append(out, r)
	}
	return out
}

// sizeOf is a file's size, or 0 where reading it will say what is wrong.
func sizeOf(file string) uint64 {
	info, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return uint64(info.Size())
}
