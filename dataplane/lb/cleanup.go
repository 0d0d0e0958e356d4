// SPDX-License-Identifier: Apache-2.0

package lb

import "errors"

// Cleanup removes what Balancers left: what is pinned under pinDir, of all layouts, by which sockets and packets are translated while no
// process is there; and natTable and the loop in the network namespace of a file, or of the process. An empty pinDir leaves pins alone. What is not
// there is none to remove, and nothing else is touched.
//
// Connections that were translated at the socket live on. Those that were by packets end, unless another rule keeps conntrack and NAT.
func Cleanup(pinDir, netNS string) error {
	var errs []error
	if pinDir != "" {
		errs = append(errs, removeLayouts(pinDir, ""))
	}
	return errors.Join(append(errs, RemoveNAT(netNS), RemoveLoop(netNS))...)
}
