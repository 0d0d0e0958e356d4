// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Cleanup removes what Balancers left: what is pinned under pinDir, of all layouts, by which sockets and packets are translated while no
// process is there; and natTable in the network namespace of a file, or of the process. An empty pinDir leaves pins alone. What is not
// there is none to remove, and nothing else is touched.
//
// Connections that were translated at the socket live on. Those that were by packets end, unless another rule keeps conntrack and NAT.
func Cleanup(pinDir, netNS string) error {
	var errs []error
	if pinDir != "" {
		errs = append(errs, removePins(pinDir))
	}
	return errors.Join(append(errs, RemoveNAT(netNS))...)
}

func removePins(pinDir string) error {
	entries, err := os.ReadDir(pinDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for pins: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && layouts.MatchString(e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(pinDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
