// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"bufio"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// InterruptsKeptApart reports whether the kernel takes the time in hard and soft interrupts out of the run time of the tasks
// that they interrupt (CONFIG_IRQ_TIME_ACCOUNTING), so that no cgroup and no thread shows it. Where it does not, run time
// includes it, and what /proc/stat shows is sampled by ticks and must not be added. False when nothing tells. It belongs into
// the description of a run's environment.
var InterruptsKeptApart = sync.OnceValue(func() bool {
	// Pressure of interrupts is a file exactly on kernels with CONFIG_IRQ_TIME_ACCOUNTING, if pressure is recorded at all.
	// Linux 6.1 or newer (kernel/sched/psi.c).
	if _, err := os.Stat("/proc/pressure/irq"); err == nil {
		return true
	}
	for _, open := range []func() (io.ReadCloser, error){openConfig, openBootConfig} {
		if config, err := open(); err == nil {
			defer config.Close()
			return hasLine(config, "CONFIG_IRQ_TIME_ACCOUNTING=y")
		}
	}
	return false
})

// openConfig opens the configuration that the kernel carries in itself (CONFIG_IKCONFIG_PROC).
func openConfig() (io.ReadCloser, error) {
	file, err := os.Open("/proc/config.gz")
	if err != nil {
		return nil, err
	}
	text, err := gzip.NewReader(file)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{text, file}, nil
}

// openBootConfig opens the configuration that distributions install beside the kernel.
func openBootConfig() (io.ReadCloser, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	return os.Open("/boot/config-" + unix.ByteSliceToString(name.Release[:]))
}

func hasLine(text io.Reader, line string) bool {
	scanner := bufio.NewScanner(text)
	for scanner.Scan() {
		if scanner.Text() == line {
			return true
		}
	}
	return false
}
