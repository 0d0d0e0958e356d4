// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// jobVariable is in the kernel's command line, which gives init what it does not know as environment. A name with a dot would be a
// module's.
const jobVariable = "PLIMSOLL_JOB"

// IsInit tells whether this process is a guest's init.
func IsInit() bool { return os.Getpid() == 1 && os.Getenv(jobVariable) != "" }

// outPort is where what a job writes leaves the guest.
const outPort = "/dev/ttyS1"

// The last line of what a guest writes.
const (
	doneLine   = "done"
	failedLine = "failed: "
)

var errUnfinished = errors.New("ended before its job was done")

// outcome is what a guest wrote before its last line, or the error that the line tells.
func outcome(text []byte) ([]byte, error) {
	at := bytes.LastIndexByte(bytes.TrimRight(text, "\n"), '\n') + 1
	last := string(bytes.TrimRight(text[at:], "\n"))
	if why, failed := strings.CutPrefix(last, failedLine); failed {
		return nil, errors.New(why)
	}
	if last != doneLine {
		return nil, errUnfinished
	}
	return text[:at], nil
}

// Init is a guest's init: it makes the system what a job expects of it, has it done, and ends the machine, whatever comes of it. What the job
// writes to out is what [Machine.Run] returns.
func Init(do func(ctx context.Context, job []byte, out io.Writer) error) {
	err := initialise()
	if err != nil {
		err = fmt.Errorf("init: %w", err)
	}
	port, openErr := os.OpenFile(outPort, os.O_WRONLY|unix.O_NOCTTY, 0)
	if openErr == nil {
		openErr = raw(port)
	}
	if err = errors.Join(err, openErr); err == nil {
		var job []byte
		if job, err = base64.RawURLEncoding.DecodeString(os.Getenv(jobVariable)); err == nil {
			err = do(context.Background(), job, port)
		}
	}
	last := doneLine
	if err != nil {
		fmt.Fprintln(os.Stderr, "plimsoll:", err) // to the console
		last = failedLine + strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	if port != nil {
		fmt.Fprintln(port, last)
		// TCSBRK waits until all has left.
		unix.IoctlSetInt(int(port.Fd()), unix.TCSBRK, 1)
	}
	// With -no-reboot the machine ends so, and needs no ACPI.
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// raw has a serial port pass bytes as they are.
func raw(port *os.File) error {
	t, err := unix.IoctlGetTermios(int(port.Fd()), unix.TCGETS)
	if err != nil {
		return fmt.Errorf("%s: %w", outPort, err)
	}
	t.Oflag &^= unix.OPOST
	t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200
	return unix.IoctlSetTermios(int(port.Fd()), unix.TCSETS, t)
}

// mounts are a guest's file systems, in this order.
var mounts = []struct {
	kind, target, options string
}{
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"devtmpfs", "/dev", ""},
	{"tmpfs", "/run", ""},
	{"tmpfs", "/tmp", ""},
	{"tmpfs", host.MemoryDir, ""},
	{"cgroup2", "/sys/fs/cgroup", ""},
	{"bpf", "/sys/fs/bpf", ""},
}

// sysctls are those of a node that a distribution's init would have set.
var sysctls = map[string]string{
	"kernel/printk":             "4 4 1 7",
	"net/core/bpf_jit_enable":   "1",
	"net/core/somaxconn":        "65535",
	"net/ipv4/ip_forward":       "1",
	"kernel/randomize_va_space": "0", // the same addresses each time, by other seeds, too
}

func initialise() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for name, value := range sysctls {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	for name, value := range map[string]string{"PATH": guestBin + ":/usr/sbin:/usr/bin", "HOME": "/root"} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
